"""Which token types get the effort, and which gain: rare and frequent ones, code, comments, identifiers."""

from collections.abc import Mapping

from matplotlib.figure import Figure

from benchmarks.evidence.drawing import intervals, panels
from benchmarks.evidence.fronts import CE, Group

GROUPS = ("1500", "6000")
SHOWN = ("nvamp", "nvamp:gamma=0.04,tail=0.05", "ce:label_smoothing=0.1", "nvamp:gradient=token")
RARE_FIRST = ("rare", "mid", "frequent")


def types_of(group: Group) -> list[str]:
    """Rare tokens first, then the parts of Python's grammar."""
    run = next(run for (loss, *_), run in group.runs.items() if loss == CE and not run["diverged"])
    return [*RARE_FIRST, *(name for name in run["types"] if name not in RARE_FIRST and name != "unparsed")]


def figure(groups: Mapping[str, Group]) -> Figure:
    group = groups["1500"]
    types = types_of(group)
    drawn, (left, right) = panels(2, height=4.4)
    intervals(left, types, {loss: [group.type_change(loss, name) for name in types] for loss in SHOWN})
    intervals(right, types, {loss: [group.effort(loss, name) for name in types] for loss in SHOWN})
    left.axvline(0, color="black", linewidth=0.8)
    left.set_xlabel("mean loss against ce's (%)")
    right.axvline(1, color="black", linewidth=0.8)
    right.set_xlabel("effort: share of weight / share of tokens")
    right.set_yticklabels([])
    drawn.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return drawn
