"""Fine-tuning on other text: what is learned, and what is forgotten of the first text."""

from collections.abc import Mapping

from matplotlib.figure import Figure

from benchmarks.evidence.drawing import intervals, panels
from benchmarks.evidence.fronts import Group
from benchmarks.evidence.plan import TUNED
from nvamp.study.store import Json

GROUPS = ("start", "reference", "answers")
LABELS = {"reference": "prose", "answers": "questions and answers"}
SHOWN = tuple(loss for loss in TUNED if loss != "dft")  # which may lie far off the chart


def start(groups: Mapping[str, Group]) -> Json:
    """The run whose model is fine-tuned."""
    return next(iter(groups["start"].runs.values()))


def figure(groups: Mapping[str, Group]) -> Figure:
    drawn, (left, right) = panels(2)
    tuned = {label: groups[name] for name, label in LABELS.items()}
    first = start(groups)
    intervals(
        left, SHOWN, {label: [group.values(loss, "mean") for loss in SHOWN] for label, group in tuned.items()}
    )
    intervals(
        right, SHOWN, {label: [group.gained(loss, first) for loss in SHOWN] for label, group in tuned.items()}
    )
    left.set_xlabel("held-out loss on the new text (nats)")
    right.set_xlabel("held-out loss on the first text, minus before (nats)")
    right.set_yticklabels([])
    drawn.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return drawn
