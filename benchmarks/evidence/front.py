"""Does a lighter tail come cheaper from a loss than from a temperature?"""

from collections.abc import Mapping

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.evidence.drawing import panels
from benchmarks.evidence.fronts import CE, Group
from benchmarks.evidence.held_out import TEMPERATURES
from benchmarks.evidence.plan import CORE
from nvamp.study.report import COLOURS

GROUPS = ("240", "1500", "6000", "wide")
# r of the weight 1 + r on the hardest 5%. For NVAMP it is gamma/(tail·(alpha·d + beta)), with the d of 0.8
# that training has most of the time.
WEIGHTS = {
    "nvamp:gamma=0.02,tail=0.05": 0.5,
    "tail": 1.0,
    "nvamp:gamma=0.04,tail=0.05": 1.0,
    "tail:strength=2": 2.0,
}
SHOWN = CORE[1:8]
LIMITS = {"xlim": (-1.5, 4.5), "ylim": (-13, 1.5)}  # percent; what lies outside is in the table


def figure(groups: Mapping[str, Group]) -> Figure:
    """Mean against tail: each loss as trained, with its temperatures as a line through it."""
    shown = {name: group for name, group in groups.items() if name in GROUPS[:3]}
    drawn, axes = panels(len(shown), height=4.2)
    for one, (name, group) in zip(axes, shown.items(), strict=True):
        draw_fronts(one, group)
        one.set(xlabel="mean against ce's (%)", title=f"{name} steps", **LIMITS)
    axes[0].set_ylabel("worst-5% mean against ce's (%)")
    drawn.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return drawn


def draw_fronts(axes: Axes, group: Group) -> None:
    for index, loss in enumerate((CE, *SHOWN)):
        changes = [
            (group.at_temperature(loss, "mean", place), group.at_temperature(loss, "cvar", place))
            for place in range(len(TEMPERATURES))
        ]
        points = [(mean.mean, tail.mean) for mean, tail in changes if mean and tail]
        if not points:
            continue
        colour = "black" if loss == CE else COLOURS[index % len(COLOURS)]
        axes.plot(*zip(*points, strict=True), color=colour, linewidth=2 if loss == CE else 1)
        as_trained = points[TEMPERATURES.index(1.0)]
        axes.plot(*as_trained, "osD^vP*X"[index % 8], color=colour, markersize=6, label=loss)
        if loss == CE:
            for temperature, point in zip(TEMPERATURES, points, strict=True):
                if temperature in (1.05, 1.1, 1.2):
                    axes.annotate(
                        f"T = {temperature}", point, xytext=(4, 3), textcoords="offset points", fontsize=7
                    )
    axes.axhline(0, color="#999999", linewidth=0.8)
    axes.axvline(0, color="#999999", linewidth=0.8)
