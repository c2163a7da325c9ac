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
from matplotlib.patches import Patch

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


# What a record calls a contender, and what the figure calls it.
FROM_LOGITS = {
    "floor: copy of 6·N·V bytes": "copying the bytes that must move",
    "nvamp: scalar": "nvamp: NVAMP",
    "nvamp: scalar, in place": "nvamp: NVAMP, in place",
    "Liger, in place": "Liger: cross-entropy, in place",
    "compiled cross-entropy": "torch.compile: cross-entropy",
    "eager cross-entropy": "PyTorch: cross-entropy",
    "original NVAMP": "NVAMP as first published",
}
FROM_HIDDEN = {
    "three bare products": "the three matrix products alone",
    "nvamp: scalar": "nvamp: NVAMP",
    "nvamp: tail=0.05": "nvamp: NVAMP, hardest 5%",
    "nvamp: token": "nvamp: NVAMP, a weight per token",
    "compiled linear, cross-entropy": "torch.compile: cross-entropy",
    "eager linear, cross-entropy": "PyTorch: cross-entropy",
    "Liger, bfloat16 sum": "Liger: cross-entropy",
    "Liger, float32 sum": "Liger: cross-entropy, float32 sum",
    "CCE, filtering": "Cut Cross-Entropy",
    "CCE, filter_eps=None": "Cut Cross-Entropy, exact",
}


def speed() -> Figure:
    """Time and memory of benchmarks/results/h100/fifth.json, at 8192 tokens and a vocabulary of 128256."""
    parts = {section["part"]: section.get("timing") for section in _record("h100/fifth.json")["sections"]}
    figure = Figure(figsize=(6.0, 5.4), layout="constrained")
    rows = figure.subplots(2, 1, height_ratios=[len(FROM_LOGITS), len(FROM_HIDDEN)])
    for axes, path, names, title in zip(
        rows,
        ("logits", "linear"),
        (FROM_LOGITS, FROM_HIDDEN),
        ("From logits: milliseconds, and memory held", "From hidden states: milliseconds, and memory held"),
        strict=True,
    ):
        found = [row for row in parts[f"{path}:8192x4096x128256"] if row["what"] in names]
        found.sort(key=lambda row: row["ms"])
        for place, row in enumerate(found):
            name = names[row["what"]]
            axes.barh(place, row["ms"], 0.7, color=BLUE if name.startswith("nvamp") else GREY, alpha=0.8)
            memory = f" · {row['extra_MiB'] / 1024:.1f} GiB" if "extra_MiB" in row else ""
            _label(axes, row["ms"], place, f"{row['ms']:#.3g}".rstrip(".") + memory, 8)
        axes.set_yticks(range(len(found)), [names[row["what"]] for row in found], fontsize=9)
        axes.set_xlim(0, 1.25 * found[-1]["ms"])
        axes.tick_params(axis="x", labelsize=8)
        axes.tick_params(axis="y", length=0)
        axes.set_title(title, loc="right", fontsize=10)
        axes.invert_yaxis()
    return figure


def cpu() -> Figure:
    """Time and memory of benchmarks/results/cpu-logits.json and of the linear path in cpu.json."""
    figure = Figure(figsize=(7.2, 6.6), layout="constrained")
    rows = figure.subplots(2, 2, height_ratios=[7, 9])
    for axes, record, path in zip(
        rows,
        ("cpu-logits.json", "cpu.json"),
        ("logits path, 2048 × 32000", "linear path, 2048 × 576 × 49152"),
        strict=True,
    ):
        sections = {section["title"]: section for section in _record(record)["sections"]}
        both = [sections[f"{path}, {dtype}"] for dtype in ("float32", "bfloat16")]
        memory = [{k: v / 2**20 for k, v in section["extra_bytes"].items()} for section in both]
        _bars(axes[0], [section["ratios"] for section in both], "{:.2f}", (0, 0.5, 1, 1.5, 2))
        _bars(axes[1], memory, "{:.0f}", (0, 250, 500, 750, 1000, 1250))
        axes[0].set_title(f"{path}\ntime over {both[0]['baseline']}", loc="right", fontsize=9)
        axes[1].set_title("memory beyond the inputs (MiB)", fontsize=9)
        axes[1].set_yticklabels([])
    keys = [Patch(color=BLUE, label="float32"), Patch(color=ORANGE, label="bfloat16")]
    figure.legend(handles=keys, loc="outside lower right", ncols=2, fontsize=8)
    return figure


def _record(name: str) -> Any:
    return json.loads((HERE / "../benchmarks/results" / name).read_text(encoding="utf-8"))


def _label(axes: Any, x: float, y: float, text: str, size: float) -> None:
    """A text a little to the right of the end of a bar."""
    axes.annotate(text, (x, y), (3, 0), textcoords="offset points", va="center", fontsize=size)


def _bars(axes: Any, both: list[dict[str, float]], form: str, ticks: tuple[float, ...]) -> None:
    """A pair of bars for each contender with its number; beyond the last tick a bar has a gap."""
    limit, gap = ticks[-1], 0.02 * ticks[-1]
    for index, (values, colour) in enumerate(zip(both, (BLUE, ORANGE), strict=True)):
        for place, value in enumerate(values.values()):
            y = place + (index - 0.5) * 0.4
            axes.barh(y, min(value, limit), 0.36, color=colour)
            if value > limit:
                axes.barh(y, 2 * gap, 0.36, left=limit + gap, color=colour)
            _label(axes, value if value <= limit else limit + 3 * gap, y, form.format(value), 7)
    axes.set_yticks(range(len(both[0])), both[0], fontsize=8)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks], fontsize=8)
    axes.set_xlim(0, 1.2 * limit)
    axes.invert_yaxis()


FIGURES = {"weights": weights, "speed": speed, "cpu": cpu}


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
