"""The results of a study: the record of each run, and a summary of each loss over its seeds."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from nvamp.study.corpus import Corpus
from nvamp.study.losses import Loss
from nvamp.study.metrics import METRICS, VERDICT_KEYS, difference, estimate, held_out_metrics, verdict
from nvamp.study.packing import IGNORED
from nvamp.study.store import Json, Store
from nvamp.study.training import Run

BINS = 60  # bins of the distribution of token losses
TAIL_POINTS = 120  # thresholds of the survival function


class Grid(NamedTuple):
    """The token losses (nats) at which every distribution is evaluated."""

    bin_edges: NDArray[np.float64]  # [BINS + 1]
    thresholds: NDArray[np.float64]  # [TAIL_POINTS]


def describe(loss: Loss, seed: int, run: Run, classes: NDArray[np.int64]) -> Json:
    """The record of a run: all of its numbers except the token losses."""
    return {
        "loss": loss.name,
        "seed": seed,
        "diverged": run.diverged,
        "steps": run.steps,
        "seconds": run.seconds,
        "parameters": run.model.num_parameters(),
        "logits_because": run.logits_because,
        "curve": run.curve,
        "metrics": {
            **held_out_metrics(run.nll, run.scores.correct, classes[run.scores.labels]),
            "tokens_per_second": run.tokens_per_second,
            "loss_share": 100 * run.loss_share,
            "peak_memory": run.peak_memory and run.peak_memory / 1e6,
        },
    }


def describe_corpus(corpus: Corpus) -> Json:
    """What the text is, and how much of it there is."""
    return {
        "source": corpus.source,
        "sequence": corpus.train.shape[1],
        "vocabulary": len(corpus.tokenizer),
        "train_tokens": corpus.train.numel(),
        "learned_tokens": len(corpus.training.learned),
        "held_out_tokens": len(corpus.evaluation.learned),
        **corpus.counts,
        "unigram_cross_entropy": _unigram_cross_entropy(corpus),
    }


def _unigram_cross_entropy(corpus: Corpus) -> float:
    """Held-out cross-entropy (nats) of a model that knows only the token frequencies of the training text."""
    tokens = corpus.training.labels.numpy()
    counts = np.bincount(tokens[tokens != IGNORED], minlength=len(corpus.tokenizer)) + 1
    labels = corpus.evaluation.learned.numpy()
    return float(np.log(counts.sum()) - np.log(counts[labels]).mean())


def gather(losses: Sequence[Loss], seeds: int, store: Store) -> Json:
    """The results of the finished runs: each loss over its seeds, and against the first loss."""
    runs = {loss.name: [store.kept(loss, seed) for seed in range(seeds)] for loss in losses}
    records = {name: [record for record, _ in of_loss] for name, of_loss in runs.items()}
    baseline = records[losses[0].name]
    tokens = {name: _token_losses(of_loss) for name, of_loss in runs.items()}
    largest = max((x.max().item() for x in tokens.values() if x is not None), default=1.0)
    grid = Grid(np.linspace(0, largest, BINS + 1), np.linspace(0, largest, TAIL_POINTS))
    return {
        "baseline": losses[0].name,
        "parameters": baseline[0]["parameters"],
        "grid": {name: points.tolist() for name, points in grid._asdict().items()},
        "losses": [
            _summary(loss.name, records[loss.name], baseline, tokens[loss.name], grid) for loss in losses
        ],
        "pages": {
            loss.name: store.page(loss).relative_to(store.out).as_posix()
            for loss in losses
            if store.page(loss).exists()
        },
        "runs": [record for loss in losses for record in records[loss.name]],
    }


def _token_losses(runs: Sequence[tuple[Json, NDArray[np.float32]]]) -> NDArray[np.float32] | None:
    """The held-out token losses (nats) of all seeds, [seeds · tokens]; `None` if a run diverged."""
    if any(record["diverged"] for record, _ in runs):
        return None
    return np.concatenate([nll for _, nll in runs])


def _summary(
    name: str,
    records: Sequence[Json],
    baseline: Sequence[Json],
    tokens: NDArray[np.float32] | None,
    grid: Grid,
) -> Json:
    metrics, differences, verdicts = {}, {}, {}
    for metric in METRICS:
        values = [record["metrics"][metric.key] for record in records]
        paired = difference(values, [record["metrics"][metric.key] for record in baseline])
        mean = estimate(values)
        metrics[metric.key] = mean and mean.as_json()
        if records is not baseline:
            differences[metric.key] = paired and paired.as_json()
            verdicts[metric.key] = verdict(paired, metric.lower_is_better)
    return {
        "name": name,
        "diverged_seeds": [record["seed"] for record in records if record["diverged"]],
        "metrics": metrics,
        "differences": differences,
        "verdicts": verdicts,
        "sentence": sentence(name, records, baseline, differences, verdicts),
        "curve": _curve(records),
        **_distribution(tokens, grid),
    }


def sentence(
    name: str, records: Sequence[Json], baseline: Sequence[Json], differences: Json, verdicts: Json
) -> str:
    """The paired differences in plain words; the baseline's sentence says that it is the baseline."""
    first = baseline[0]["loss"]
    for who, runs in ((name, records), (first, baseline)):
        diverged = [str(run["seed"]) for run in runs if run["diverged"]]
        if diverged:
            return f"{who} diverged on seed {', '.join(diverged)} of {len(runs)}: no verdict on {name}."
    if records is baseline:
        return f"{name} is the loss that the others are compared to."
    labels = {metric.key: metric.label for metric in METRICS}
    clauses = [f"{labels[key]}: {verdicts[key]} ({_shown(differences[key])})" for key in VERDICT_KEYS]
    return f"{name} against {first}: {'; '.join(clauses)}."


def _shown(difference: Json) -> str:
    mean, half = difference["mean"], difference["half_width"]
    interval = "" if half is None else f", 95% interval {mean - half:+.3f} to {mean + half:+.3f}"
    return f"{mean:+.3f} nats{interval}".replace("-", "−")


def _curve(records: Sequence[Json]) -> list[Json]:
    """The mean, lowest and highest cross-entropy of the seeds, at each step that all of them reached."""
    points = []
    for seeds in zip(*(record["curve"] for record in records), strict=False):
        values = [value for _, value in seeds]
        if any(value is None for value in values):
            break
        points.append(
            {"step": seeds[0][0], "mean": sum(values) / len(values), "low": min(values), "high": max(values)}
        )
    return points


def _distribution(tokens: NDArray[np.float32] | None, grid: Grid) -> Json:
    """The density of the token losses in the grid's bins, and their share above each threshold."""
    if tokens is None:
        return {"density": None, "survival": None}
    # In float64: NumPy would round the edges, and so the widths, to the dtype of the losses.
    density, _ = np.histogram(tokens.astype(np.float64), bins=grid.bin_edges, density=True)
    at_most = np.searchsorted(np.sort(tokens), grid.thresholds, side="right")
    return {"density": density.tolist(), "survival": (1 - at_most / tokens.size).tolist()}
