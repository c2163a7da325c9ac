"""Corrupted labels, a learning rate too high, bfloat16, and the spikes of the gradient's norm."""

from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.evidence.drawing import intervals, panels
from benchmarks.evidence.running import Preset, compact, results, run_all
from benchmarks.evidence.summary import Results
from benchmarks.evidence.tail import LOSSES
from nvamp.study.compare import LR
from nvamp.study.store import Json

# What is changed in the recipe, by the name of the directory of such runs.
CHANGES: dict[str, Json] = {
    "plain": {},
    "noise-10": {"noise": 0.1},
    "noise-30": {"noise": 0.3},
    "lr-2x": {"lr": 2 * LR},
    "lr-4x": {"lr": 4 * LR},
    "bfloat16": {"bf16": True},
}


def run(preset: Preset, out: Path) -> Json:
    corpus, runs = preset.corpus(), []
    for group, changed in CHANGES.items():
        finished = run_all(out / group, LOSSES, range(preset.seeds), preset.recipe(**changed), corpus)
        runs += [compact(group, one) for one in finished]
    return results(preset, corpus, runs)


def figure(results: Results) -> Figure:
    drawn, (left, right) = panels(2)
    groups = results.groups()
    changes = {
        loss: [results.difference(loss, "cross_entropy", group) for group in groups]
        for loss in results.losses()[1:]
    }
    intervals(left, groups, changes, first=1)
    left.axvline(0, color="black", linewidth=0.8)
    left.set_xlabel("held-out cross-entropy minus ce's (nats)")
    peaks = {
        loss: [results.mean(loss, "gradient_peak", group) for group in groups] for loss in results.losses()
    }
    intervals(right, groups, peaks)
    right.set(xlabel="largest gradient norm / median", xscale="log", xlim=(1, None))
    drawn.legend(*right.get_legend_handles_labels(), loc="outside upper center", ncols=4)
    return drawn
