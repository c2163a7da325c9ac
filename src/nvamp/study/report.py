"""The report of a study: one self-contained page."""

import re
from collections.abc import Iterator, Mapping
from io import StringIO
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape
from matplotlib import rc_context
from matplotlib.figure import Figure

from nvamp.study.corpus import CLASSES
from nvamp.study.files import replacing
from nvamp.study.metrics import METRICS, TIMES, Metric, change_unit, measured, short
from nvamp.study.results import cautions
from nvamp.study.store import Json

# Okabe and Ito's palette, which the colour-blind can distinguish; dashes distinguish losses without colour.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)))
_SVG_DASHES = ("none", "6 3", "8 3 2 3", "2 3", "8 2 2 2 2 2", "2 2")  # the same in the page's own drawings

# The metrics of the small plot of intervals at the top.
GLANCE = ("cvar", "cross_entropy", "rare", "accuracy", "exact_match", "also")

# Placeholders for the colours of the page, which has a light and a dark scheme.
_TEXT, _RULE = "#010203", "#040506"
_STYLE = {
    "svg.fonttype": "none",
    "font.size": 10,
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
    "lines.linewidth": 1.8,
}
_BAND = {"alpha": 0.2, "linewidth": 0}


class Style(NamedTuple):
    """How a loss is drawn."""

    colour: str
    dashes: Any  # for matplotlib
    svg_dashes: str


class Panel(NamedTuple):
    """One metric of the plot of intervals."""

    metric: Metric
    reach: str  # what the axis reaches on both sides of zero, with its unit
    rows: list[
        Json
    ]  # of a loss each: its title and style, its change in words, and where to draw it in percent


def write_report(results: Json, path: Path) -> Path:
    """Write the page of `results`, as `compare` returns them, to `path`.

    Raises:
        StudyError: it cannot be written.
    """
    template = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["breakable"] = _breakable
    drawn = {
        "curves": curves(results),
        "classes": classes(results, "metrics", "cross-entropy (nats)"),
        "class_differences": classes(results, "differences", f"difference to {results['baseline']} (nats)"),
        "density": density(results),
        "tail": tail(results),
    }
    page = environment.from_string(template).render(
        results=results,
        title=title(results),
        metrics=measured(METRICS, results["losses"][0]["metrics"]),
        times=measured(TIMES, results["losses"][0]["times"]),
        cautions=cautions(results),
        styles={loss["name"]: style for loss, style in styled(results)},
        panels=panels(results),
        settings=settings(results),
        figures={name: figure for name, figure in drawn.items() if figure},
    )
    with replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


def _breakable(name: str) -> Markup:
    """The name of a loss, which may break after its colon and its commas."""
    return Markup(re.sub("([:,])", r"\1<wbr>", str(escape(name))))


def title(results: Json) -> str:
    """The question of the study: `NVAMP and DFT against cross-entropy`."""
    baseline, *others = (loss["title"] for loss in results["losses"])
    if not others:
        text = f"{baseline} on held-out text"
    elif len(others) > 2:
        text = f"{len(others)} losses against {baseline}"
    else:
        text = f"{' and '.join(others)} against {baseline}"
    return text[0].upper() + text[1:]


def settings(results: Json) -> Iterator[tuple[str, str]]:
    """The name and the value of each option of the study; a default is named as what it was."""
    defaults = {
        "model": "the built-in Llama, from scratch",
        "sequence": f"{results['text']['sequence']} tokens",
        "loss_on": "completions" if "examples" in results["text"] else "all",
        "text": "none" if results["settings"].get("dataset") else results["text"]["source"],
    }
    for name, value in results["settings"].items():
        if value is None or value in ([], ()):
            shown = defaults.get(name, "none")
        elif isinstance(value, bool):
            shown = "yes" if value else "no"
        else:
            shown = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
        yield name.replace("_", "-"), shown


def panels(results: Json) -> list[Panel]:
    """The changes against the baseline, metric by metric; none if no loss has one."""
    metrics = {metric.key: metric for metric in METRICS}
    found = [_panel(metrics[key], results) for key in GLANCE]
    return [panel for panel in found if panel.rows]


def _panel(metric: Metric, results: Json) -> Panel:
    changes = [(loss, style, loss["changes"].get(metric.key)) for loss, style in styled(results)]
    drawn = [(loss, style, change) for loss, style, change in changes if change]
    reach = max((abs(change["mean"]) + (change["half_width"] or 0) for _, _, change in drawn), default=0) or 1
    unit = change_unit(metric)
    rows = []
    for loss, style, change in drawn:
        middle, half = 50 + 45 * change["mean"] / reach, 45 * (change["half_width"] or 0) / reach
        rows.append(
            {
                "title": loss["title"],
                "style": style,
                "verdict": loss["verdicts"][metric.key],
                "text": metric.shown(change, "+") + unit,
                "low": f"{middle - half:.2f}",
                "middle": f"{middle:.2f}",
                "high": f"{middle + half:.2f}",
            }
        )
    return Panel(metric, short(reach) + unit, rows)


def curves(results: Json) -> Markup | None:
    """Held-out cross-entropy over steps, with its interval over the seeds."""
    drawn = [(loss["curve"], style) for loss, style in styled(results) if loss["curve"]]
    with rc_context(_STYLE):
        figure, axes = _figure()
        for points, style in drawn:
            columns = {key: [point[key] for point in points] for key in points[0]}
            _draw(axes, columns.pop("step"), columns, style)
        axes.set(xlabel="optimizer step", ylabel="held-out cross-entropy (nats)")
        return _svg(figure, "curves") if drawn else None


def classes(results: Json, kind: str, label: str) -> Markup | None:
    """Cross-entropy of frequent, mid and rare tokens, with its interval.

    Args:
        kind: "metrics", or "differences" for those to the baseline.
    """
    drawn = [
        (loss[kind], style)
        for loss, style in styled(results)
        if any(loss[kind].get(name) for name in CLASSES)
    ]
    with rc_context(_STYLE):
        figure, axes = _figure()
        width = 0.8 / max(len(drawn), 1)
        for index, (values, style) in enumerate(drawn):
            found = [(x, values[name]) for x, name in enumerate(CLASSES) if values[name] is not None]
            axes.errorbar(
                [x + (index - (len(drawn) - 1) / 2) * width for x, _ in found],
                [estimate["mean"] for _, estimate in found],
                _half_widths([estimate["half_width"] for _, estimate in found]),
                color=style.colour,
                fmt="o",
                markersize=4,
                elinewidth=1.8,
                capsize=3,
            )
        axes.set_xticks(range(len(CLASSES)), CLASSES)
        axes.set_ylabel(label)
        if kind == "differences":
            axes.axhline(0, color=_TEXT, linewidth=0.8)
        return _svg(figure, f"classes-{kind}") if drawn else None


def density(results: Json) -> Markup | None:
    """Density of the held-out token losses, with its interval over the seeds."""
    edges = results["grid"]["bin_edges"]
    middles = [(low + high) / 2 for low, high in pairwise(edges)]
    drawn = [(loss["density"], style) for loss, style in styled(results) if loss["density"]]
    with rc_context(_STYLE):
        figure, axes = _figure()
        for values, style in drawn:
            _draw(axes, middles, values, style)
        axes.set(xlabel="token loss (nats)", ylabel="density", ylim=(0, None))
        return _svg(figure, "density") if drawn else None


def tail(results: Json) -> Markup | None:
    """The share of held-out tokens whose loss exceeds a threshold, logarithmic, with its interval."""
    drawn = [(loss["survival"], style) for loss, style in styled(results) if loss["survival"]]
    with rc_context(_STYLE):
        figure, axes = _figure()
        axes.set_yscale("log")
        for values, style in drawn:
            shares = [(i, share) for i, share in enumerate(values["mean"]) if share > 0]
            _draw(
                axes,
                [results["grid"]["thresholds"][i] for i, _ in shares],
                {key: [column[i] for i, _ in shares] for key, column in values.items()},
                style,
            )
        smallest = min((share for values, _ in drawn for share in values["mean"] if share > 0), default=0.1)
        axes.set(
            xlabel="threshold x (nats)", ylabel="share of tokens with loss > x", ylim=(smallest / 2, 1.1)
        )
        return _svg(figure, "tail") if drawn else None


def _draw(axes: Any, x: list[float], values: Mapping[str, Any], style: Style) -> None:
    """A line through the means and a band of their 95% intervals; no band if one seed gives no interval."""
    means, halves = values["mean"], _half_widths(values["half_width"])
    if halves:
        low, high = zip(*((m - h, m + h) for m, h in zip(means, halves, strict=True)), strict=True)
        axes.fill_between(x, low, high, color=style.colour, **_BAND)
    axes.plot(x, means, color=style.colour, linestyle=style.dashes)


def _half_widths(found: list[float | None]) -> list[float] | None:
    """The half widths of intervals; `None` if they have none, as with a single seed."""
    widths = [width for width in found if width is not None]
    return widths if len(widths) == len(found) else None


def styled(results: Json) -> Iterator[tuple[Json, Style]]:
    """Each loss with its style; 36 losses have one of their own."""
    for index, loss in enumerate(results["losses"]):
        dash = (index + index // len(COLOURS)) % len(DASHES)
        yield loss, Style(COLOURS[index % len(COLOURS)], DASHES[dash], _SVG_DASHES[dash])


def _figure() -> tuple[Any, Any]:
    figure = Figure(figsize=(5, 3.3), layout="constrained")
    return figure, figure.subplots()


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
