"""What happens to extreme errors and to calibration, beside a temperature's effect on both?"""

from collections.abc import Mapping

from matplotlib.figure import Figure

from benchmarks.evidence.drawing import intervals, panels
from benchmarks.evidence.fronts import Group
from benchmarks.evidence.plan import CORE

GROUPS = ("240", "1500", "6000")
SHOWN = CORE[1:8]
LABELS = {"cvar": "worst 5%", "extreme": "worst 0.1%", "max": "largest"}


def figure(groups: Mapping[str, Group]) -> Figure:
    """How much lighter each loss makes the tail, the further out the more extreme."""
    shown = {name: groups[name] for name in ("1500", "6000") if name in groups}
    drawn, axes = panels(len(shown), height=4.2)
    for one, (name, group) in zip(axes, shown.items(), strict=True):
        losses = [loss for loss in SHOWN if group.seeds(loss)]
        changes = {label: [group.change(loss, key) for loss in losses] for key, label in LABELS.items()}
        intervals(one, losses, changes)
        one.axvline(0, color="black", linewidth=0.8)
        one.set(xlabel="held-out loss against ce's (%)", title=f"{name} steps")
    drawn.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return drawn
