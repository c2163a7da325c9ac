"""Outliers: does the tail of the held-out token losses shrink, and at what price in the mean?"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from benchmarks.evidence.drawing import intervals, panels
from benchmarks.evidence.running import Finished, Preset, compact, results, run_all
from benchmarks.evidence.summary import Results
from nvamp.study.report import COLOURS, DASHES
from nvamp.study.results import TAIL_POINTS
from nvamp.study.store import Json

LOSSES = ("ce", "nvamp", "nvamp:gradient=token", "nvamp:gamma=0.05")


def run(preset: Preset, out: Path) -> Json:
    corpus = preset.corpus()
    finished = list(run_all(out / "plain", LOSSES, range(preset.seeds), preset.recipe(), corpus))
    return results(preset, corpus, [compact("plain", one) for one in finished], survival=survival(finished))


def survival(finished: Sequence[Finished]) -> Json:
    """The share of token losses above thresholds (nats) up to the largest, all seeds together."""
    thresholds = np.linspace(0, max(float(one.nll.max()) for one in finished), TAIL_POINTS)
    shares = {}
    for loss in dict.fromkeys(one.record["loss"] for one in finished):
        nll = np.sort(np.concatenate([one.nll for one in finished if one.record["loss"] == loss]))
        above = 1 - np.searchsorted(nll, thresholds, side="right") / nll.size
        shares[loss] = [float(f"{share:.4g}") for share in above]
    return {"thresholds": [round(float(x), 4) for x in thresholds], "shares": shares}


def figure(results: Results) -> Figure:
    drawn, (left, right) = panels(2)
    for index, (loss, shares) in enumerate(results.json["survival"]["shares"].items()):
        points = [
            (x, y) for x, y in zip(results.json["survival"]["thresholds"], shares, strict=True) if y > 0
        ]
        left.plot(
            *zip(*points, strict=True),
            color=COLOURS[index],
            linestyle=DASHES[index],
            label=loss,
            linewidth=1.6,
        )
    left.set(xlabel="threshold (nats)", ylabel="share of held-out tokens above it", yscale="log")
    left.legend(fontsize=8)
    rows = {"cross_entropy": "mean", "cvar": "worst 5%", "max": "largest"}
    changes = {loss: [results.percent(loss, key) for key in rows] for loss in results.losses()[1:]}
    intervals(right, list(rows.values()), changes, first=1)
    right.axvline(0, color="black", linewidth=0.8)
    right.set_xlabel("held-out loss against ce's (%)")
    return drawn
