"""Figures of the experiments: light SVG, the colours of the report."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from nvamp.study.metrics import Estimate
from nvamp.study.report import COLOURS

STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "evidence",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}


def panels(count: int, height: float = 3.2) -> tuple[Figure, Any]:
    figure = Figure(figsize=(4.4 * count, height), layout="constrained")
    return figure, figure.subplots(1, count)


def intervals(axes: Any, rows: Sequence[str], series: Mapping[str, Sequence[Estimate | None]]) -> None:
    """A dot and its 95% interval for each row, the first on top."""
    for index, (label, values) in enumerate(series.items()):
        found = [(place, value) for place, value in enumerate(values) if value is not None]
        axes.errorbar(
            [value.mean for _, value in found],
            [place + (index - (len(series) - 1) / 2) * 0.22 for place, _ in found],
            xerr=[value.half_width or 0 for _, value in found],
            fmt="osD^"[index % 4],
            markersize=4,
            linewidth=1.3,
            color=COLOURS[index % len(COLOURS)],
            label=label,
        )
    axes.set_yticks(range(len(rows)), rows)
    axes.set_ylim(len(rows) - 0.5, -0.5)


def save(figure: Figure, path: Path) -> None:
    """Write an SVG that is the same whenever it is drawn of the same numbers."""
    with rc_context(STYLE):
        figure.savefig(path, format="svg", metadata={"Date": None})
    path.write_text("\n".join(line.rstrip() for line in path.read_text().splitlines()) + "\n")
