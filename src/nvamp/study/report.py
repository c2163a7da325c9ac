"""The report of a study: one self-contained page."""

import re
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape
from matplotlib import rc_context
from matplotlib.figure import Figure

from nvamp.study.corpus import CLASSES
from nvamp.study.files import replacing
from nvamp.study.metrics import METRICS
from nvamp.study.store import Json

# Okabe and Ito's palette, which the colour-blind can distinguish; dashes distinguish losses without colour.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)))

# Placeholders for the colours of the page, which has a light and a dark scheme.
_TEXT, _RULE = "#010203", "#040506"
_STYLE = {
    "svg.fonttype": "none",
    "font.size": 11,
    "text.color": _TEXT,
    "axes.labelcolor": _TEXT,
    "axes.edgecolor": _RULE,
    "xtick.color": _TEXT,
    "ytick.color": _TEXT,
    "grid.color": _RULE,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
}


def write_report(results: Json, path: Path) -> Path:
    """Write the page of `results`, as `compare` returns them, to `path`.

    Raises:
        StudyError: it cannot be written.
    """
    template = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["emphasized"] = _emphasized
    page = environment.from_string(template).render(
        results=results,
        metrics=METRICS,
        colours={loss["name"]: colour for loss, colour, _ in _styled(results)},
        figures={
            "curves": curves(results),
            "classes": classes(results),
            "density": density(results),
            "tail": tail(results),
        },
    )
    with replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


def _emphasized(sentence: str) -> Markup:
    """A sentence of the results, its verdicts in bold."""
    verdicts = r": (better|worse)\b"
    return Markup(re.sub(verdicts, r': <strong class="\1">\1</strong>', str(escape(sentence))))


def curves(results: Json) -> Markup:
    """Held-out cross-entropy over steps: the mean of the seeds and the band between them."""
    with rc_context(_STYLE):
        figure, axes = _figure()
        for loss, colour, dashes in _styled(results):
            steps = [point["step"] for point in loss["curve"]]
            low, high = ([point[key] for point in loss["curve"]] for key in ("low", "high"))
            axes.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)
            means = [point["mean"] for point in loss["curve"]]
            axes.plot(steps, means, color=colour, linestyle=dashes, label=loss["name"])
        axes.set(xlabel="optimizer step", ylabel="held-out cross-entropy (nats)")
        axes.legend()
        return _svg(figure, "curves")


def classes(results: Json) -> Markup:
    """Cross-entropy of frequent, mid and rare tokens, and its paired difference to the baseline's."""
    with rc_context(_STYLE):
        figure = Figure(figsize=(6, 3.7), layout="constrained")
        left, right = figure.subplots(1, 2)
        _bars(left, _styled(results), "metrics")
        left.set_ylabel("cross-entropy (nats)")
        others = list(_styled(results))[1:]
        _bars(right, others, "differences")
        right.set_ylabel(f"difference to {results['baseline']} (nats)")
        right.axhline(0, color=_TEXT, linewidth=0.8)
        figure.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=3)
        return _svg(figure, "classes")


def density(results: Json) -> Markup:
    """Density of the held-out token losses."""
    with rc_context(_STYLE):
        figure, axes = _figure()
        edges = results["grid"]["bin_edges"]
        for loss, colour, dashes in _styled(results):
            if loss["density"] is not None:
                axes.stairs(
                    loss["density"], edges, color=colour, linestyle=dashes, linewidth=1.6, label=loss["name"]
                )
        axes.set(xlabel="token loss (nats)", ylabel="density")
        axes.legend()
        return _svg(figure, "density")


def tail(results: Json) -> Markup:
    """The share of held-out tokens whose loss exceeds a threshold, on a logarithmic axis."""
    with rc_context(_STYLE):
        figure, axes = _figure()
        thresholds = results["grid"]["thresholds"]
        for loss, colour, dashes in _styled(results):
            points = [(x, p) for x, p in zip(thresholds, loss["survival"] or (), strict=False) if p > 0]
            if points:
                axes.plot(*zip(*points, strict=True), color=colour, linestyle=dashes, label=loss["name"])
        axes.set(xlabel="threshold x (nats)", ylabel="share of tokens with loss > x", yscale="log")
        axes.legend()
        return _svg(figure, "tail")


def _styled(results: Json) -> Iterator[tuple[Json, str, Any]]:
    """Each loss with its colour and dashes."""
    for index, loss in enumerate(results["losses"]):
        yield loss, COLOURS[index % len(COLOURS)], DASHES[index % len(DASHES)]


def _figure() -> tuple[Any, Any]:
    figure = Figure(figsize=(6, 3.7), layout="constrained")
    return figure, figure.subplots()


def _bars(axes: Any, losses: Any, kind: str) -> None:
    """Draw one bar for each class and loss, with its interval; `kind` is "metrics" or "differences"."""
    losses = list(losses)
    width = 0.8 / max(len(losses), 1)
    for index, (loss, colour, _) in enumerate(losses):
        found = [(x, loss[kind][name]) for x, name in enumerate(CLASSES) if loss[kind][name] is not None]
        axes.bar(
            [x + (index - (len(losses) - 1) / 2) * width for x, _ in found],
            [estimate["mean"] for _, estimate in found],
            0.9 * width,
            yerr=[estimate["half_width"] or 0 for _, estimate in found],
            color=colour,
            ecolor=_TEXT,
            error_kw={"linewidth": 1},
            label=loss["name"],
        )
    axes.set_xticks(range(len(CLASSES)), CLASSES)


def _svg(figure: Any, name: str) -> Markup:
    """The figure as an `<svg>` element in the colours of the page, with ids of its own."""
    buffer = StringIO()
    with rc_context({"svg.hashsalt": name, "svg.id": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg)  # implied in HTML
    svg = svg.replace('id="', f'id="{name}-').replace('"#', f'"#{name}-').replace("url(#", f"url(#{name}-")
    return Markup(svg.replace(_TEXT, "currentColor").replace(_RULE, "var(--rule)"))
