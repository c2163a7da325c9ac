"""The front of mean against tail: is there a setting with a lighter tail at almost no price in the mean?

A search on few seeds and one half of the held-out documents; what it chooses is confirmed on new seeds and on
the other half.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from benchmarks.evidence.drawing import panels
from benchmarks.evidence.running import Finished, Preset, compact, results, run_all
from benchmarks.evidence.source import document_of, held_out_labels
from benchmarks.evidence.summary import Results
from nvamp.study.metrics import cvar
from nvamp.study.report import COLOURS
from nvamp.study.sources import read_documents
from nvamp.study.store import Json

GAIN = -5.0  # percent of cross-entropy's CVaR: what is looked for
PRICE = 0.5  # percent of its mean: what it may cost
HIGHER = 2.0  # another price: what does the tail cost if 0.5% does not buy it?
NVAMP = (
    "nvamp",
    "nvamp:alpha=0",
    "nvamp:alpha=0.1",
    "nvamp:gamma=0.01",
    "nvamp:gamma=0.02",
    "nvamp:gamma=0.05",
    "nvamp:gradient=detached",
    "nvamp:gradient=token",
    "nvamp:beta=0.3,gradient=token",
    "nvamp:beta=1,gradient=token",
    "nvamp:beta=3,gradient=token",
    "nvamp:beta=1,gamma=0.01,gradient=token",
    "nvamp:beta=3,gamma=0.01,gradient=token",
    "nvamp:gradient=full",
    "nvamp:beta=10,gradient=full",
)
OTHERS = ("focal:gamma=1", "focal", "dft")
NEW_SEEDS = 100  # from here on
OFF_THE_CHART = 25.0  # percent: what has a mean as bad is left out of the figure


def run(preset: Preset, out: Path) -> Json:
    corpus, recipe = preset.corpus(), preset.recipe()
    documents = held_out_labels(corpus, read_documents(preset.text)[0], document_of)

    def runs(group: str, losses: Sequence[str], seeds: Sequence[int], part: int) -> list[Json]:
        finished = run_all(out / "plain", losses, seeds, recipe, corpus)
        return [compact(group, one, part_metrics(one, documents % 2 == part)) for one in finished]

    search = runs("search", ("ce", *NVAMP, *OTHERS), range(preset.search_seeds), 0)
    chosen = choose(search)
    new = range(NEW_SEEDS, NEW_SEEDS + preset.seeds)
    confirm = runs("confirm", list(dict.fromkeys(("ce", *chosen.values()))), new, 1)
    return results(preset, corpus, [*search, *confirm], chosen=chosen)


def part_metrics(run: Finished, part: NDArray[np.bool_]) -> dict[str, float | None]:
    """Mean and tail of a part of the held-out tokens; `None` if the run diverged."""
    nll = run.nll[part].astype(np.float64)
    if run.record["diverged"]:
        return {"cross_entropy": None, "cvar": None, "max": None}
    return {"cross_entropy": float(nll.mean()), "cvar": cvar(nll), "max": float(nll.max())}


def changes(runs: Sequence[Json]) -> dict[str, dict[str, float]]:
    """For each loss that did not diverge, mean and tail in percent of cross-entropy's, paired by seed."""
    baseline = {one["seed"]: one["metrics"] for one in runs if one["loss"] == "ce"}
    found: dict[str, dict[str, float]] = {}
    for loss in dict.fromkeys(one["loss"] for one in runs):
        pairs = [(one["metrics"], baseline[one["seed"]]) for one in runs if one["loss"] == loss]
        if not any(ours[key] is None for ours, _ in pairs for key in ours):
            found[loss] = {
                key: float(np.mean([100 * (ours[key] / theirs[key] - 1) for ours, theirs in pairs]))
                for key in ("cross_entropy", "cvar")
            }
    return found


def choose(search: Sequence[Json]) -> dict[str, str]:
    """The losses to confirm, of NVAMP and of the others, by the reason.

    They are the lightest tail within the price and within the higher one; and if any loss reaches the gain,
    the cheapest that does.
    """
    found, chosen = changes(search), {}
    for family, losses in (("nvamp", NVAMP), ("other", OTHERS)):
        known = {loss: found[loss] for loss in losses if loss in found}
        for price in (PRICE, HIGHER):
            if affordable := [loss for loss in known if known[loss]["cross_entropy"] <= price]:
                chosen[f"{family}: lightest tail for at most {price}%"] = min(
                    affordable, key=lambda loss: known[loss]["cvar"]
                )
        if light := [loss for loss in known if known[loss]["cvar"] <= GAIN]:
            chosen[f"{family}: cheapest with the gain"] = min(
                light, key=lambda loss: known[loss]["cross_entropy"]
            )
    return chosen


def figure(results: Results) -> Figure:
    """The search and what was confirmed: mean against tail, in percent of cross-entropy's.

    The search has the numbers of its table for names.
    """
    drawn, axes = panels(2, height=4)
    for one, group in zip(axes, ("search", "confirm"), strict=True):
        for number, loss in enumerate(results.losses(group)[1:], 1):
            mean, tail = (results.percent(loss, key, group) for key in ("cross_entropy", "cvar"))
            if mean is None or tail is None or mean.mean > OFF_THE_CHART:
                continue
            style = {"color": COLOURS[1], "fmt": "o"} if loss in NVAMP else {"color": COLOURS[0], "fmt": "s"}
            bars = (mean.half_width, tail.half_width) if group == "confirm" else (None, None)
            one.errorbar(mean.mean, tail.mean, xerr=bars[0], yerr=bars[1], markersize=4, **style)
            name = loss if group == "confirm" else number
            beside = {"xytext": (4, 3), "textcoords": "offset points", "fontsize": 6.5}
            one.annotate(name, (mean.mean, tail.mean), **beside)
        left, right = one.get_xlim()
        right += 0.3 * (right - left)  # room for names
        bottom = min(one.get_ylim()[0], GAIN - 1)
        one.fill_between([min(left, -1), PRICE], bottom, GAIN, color="#009E73", alpha=0.2, linewidth=0)
        one.set(xlim=(min(left, -1), right), ylim=(bottom, None), title=group)
        one.set(xlabel="mean against ce's (%)", ylabel="worst-5% mean against ce's (%)")
        one.axhline(0, color="black", linewidth=0.8)
        one.axvline(0, color="black", linewidth=0.8)
    return drawn
