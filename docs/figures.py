"""The figures of the documentation, from the library's own code and from the results of its benchmarks.

python -m docs.figures      writes docs/figures/*.svg
"""

import json
import re
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from matplotlib import rc_context
from matplotlib.figure import Figure

from nvamp.functional import token_weights
from nvamp.objectives import GRADIENTS, NVAMP, Batch
from nvamp.objectives.statistics import statistics

HERE = Path(__file__).parent
BLUE, ORANGE = "#0072B2", "#D55E00"
COEFFICIENTS = {"alpha": 1.0, "beta": 0.02, "gamma": 0.001}
GREY = "#010203"  # stands for one that is read on white, and another on black
GREYS = "<style>svg{color:#57606a}@media(prefers-color-scheme:dark){svg{color:#adb5bd}}</style>"
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "nvamp",
    "font.size": 10,
    "text.color": GREY,
    "axes.labelcolor": GREY,
    "axes.titlecolor": GREY,
    "axes.edgecolor": GREY,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}


def batch(tokens: int = 1000) -> torch.Tensor:
    """Losses [tokens] spread as an exponential distribution of mean 3 nats: many small ones, a long tail."""
    return -3 * torch.log1p(-(torch.arange(tokens, dtype=torch.float64) + 0.5) / tokens)


def weights() -> Figure:
    """The weight of a token, over that of plain cross-entropy, as a function of z: a panel for each mode."""
    nll = batch()
    s = statistics(Batch(nll, torch.ones_like(nll, dtype=torch.bool)))
    z = (nll - s.mean) / s.std
    figure = Figure(figsize=(7.2, 5.2), layout="constrained")
    for axes, gradient in zip(figure.subplots(2, 2, sharex=True, sharey=True).flat, GRADIENTS, strict=True):
        w = token_weights(NVAMP(**COEFFICIENTS, gradient=gradient), nll) * len(nll)
        axes.axhline(0, color=GREY, linewidth=0.8)
        axes.axhline(1, color=GREY, linewidth=0.8, linestyle=":")
        jump = int((z < 0).sum()) if gradient == "full" else 0  # at the mean
        for piece in (slice(jump), slice(jump, -1)):
            axes.plot(z[piece], w[piece], color=BLUE, linewidth=2)
        axes.plot(z[-1], w[-1], "o", color=ORANGE, markersize=5)  # the largest loss
        axes.set_title(gradient, loc="left")
    figure.supxlabel("z = (ℓ − μ)/σ", color=GREY)
    figure.supylabel("weight over that of cross-entropy, w·N", color=GREY)
    return figure


def speed() -> Figure:
    """Time and memory of benchmarks/results/cpu.json."""
    results = json.loads((HERE / "../benchmarks/results/cpu.json").read_text(encoding="utf-8"))
    sections = {section["title"]: section for section in results["sections"]}
    figure = Figure(figsize=(7.2, 6.6), layout="constrained")
    rows = figure.subplots(2, 2, height_ratios=[6, 9])
    for axes, path in zip(
        rows, ("logits path, 2048 × 32000", "linear path, 2048 × 576 × 49152"), strict=True
    ):
        both = [sections[f"{path}, {dtype}"] for dtype in ("float32", "bfloat16")]
        memory = [{k: v / 2**20 for k, v in section["extra_bytes"].items()} for section in both]
        _bars(axes[0], [section["ratios"] for section in both], "{:.2f}", 2.8)
        _bars(axes[1], memory, "{:.0f}", 1400)
        axes[0].set_title(f"{path}: time over {both[0]['baseline']}", loc="right", fontsize=9)
        axes[1].set_title("memory beyond the inputs (MiB)", fontsize=9)
        axes[1].set_yticklabels([])
    rows[0][1].legend(["float32", "bfloat16"], loc="lower right", fontsize=8)
    return figure


def _bars(axes: Any, both: list[dict[str, float]], form: str, limit: float) -> None:
    """A pair of bars for each contender, told in numbers; those beyond the limit are cut off there."""
    for index, (values, colour) in enumerate(zip(both, (BLUE, ORANGE), strict=True)):
        y = [place + (index - 0.5) * 0.4 for place in range(len(values))]
        axes.barh(y, [min(value, limit) for value in values.values()], 0.36, color=colour)
        for place, value in zip(y, values.values(), strict=True):
            axes.text(min(value, limit), place, " " + form.format(value), va="center", fontsize=7)
    axes.set_yticks(range(len(both[0])), both[0], fontsize=8)
    axes.set_xlim(0, 1.12 * limit)
    axes.invert_yaxis()


FIGURES = {"weights": weights, "speed": speed}


def svg(name: str) -> str:
    """A figure as SVG; the same text each time."""
    buffer = StringIO()
    with rc_context(STYLE):
        FIGURES[name]().savefig(
            buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None}
        )
    text = re.sub(r"\s*<metadata>.*?</metadata>", GREYS, buffer.getvalue(), flags=re.DOTALL)
    return "\n".join(line.rstrip() for line in text.replace(GREY, "currentColor").splitlines()) + "\n"


if __name__ == "__main__":
    (HERE / "figures").mkdir(exist_ok=True)
    for name in FIGURES:
        (HERE / "figures" / f"{name}.svg").write_text(svg(name), encoding="utf-8")
