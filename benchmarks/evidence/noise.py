"""With wrong labels: does weight on the hardest tokens hurt, and do losses that give them less help?"""

from collections.abc import Mapping

from matplotlib.figure import Figure

from benchmarks.evidence.drawing import intervals, panels
from benchmarks.evidence.fronts import Group
from benchmarks.evidence.plan import NOISY

GROUPS = ("1500", "noise10", "noise30")
LABELS = {"1500": "clean", "noise10": "10% wrong", "noise30": "30% wrong"}


def figure(groups: Mapping[str, Group]) -> Figure:
    drawn, axes = panels(2)
    for one, key, label in zip(axes, ("mean", "cvar"), ("mean", "worst-5% mean"), strict=True):
        changes = {
            LABELS[name]: [group.change(loss, key) for loss in NOISY[1:]] for name, group in groups.items()
        }
        intervals(one, NOISY[1:], changes)
        one.axvline(0, color="black", linewidth=0.8)
        one.set_xlabel(f"held-out {label} against ce's (%)")
    axes[1].set_yticklabels([])
    drawn.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return drawn
