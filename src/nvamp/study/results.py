"""The results of a study: the record of each run, and a summary of each loss over its seeds."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from nvamp.study.corpus import Corpus
from nvamp.study.losses import Loss, in_words
from nvamp.study.metrics import (
    HEADLINES,
    METRICS,
    NO_DIFFERENCE,
    SMALL_TAIL,
    TIMES,
    Estimate,
    Range,
    change,
    change_in_words,
    change_unit,
    difference,
    estimate,
    held_out_metrics,
    measured,
    negligible,
    range_of,
    verdict,
    worst,
)
from nvamp.study.packing import IGNORED
from nvamp.study.store import Json, Store
from nvamp.study.training import Run

BINS = 60  # bins of the distribution of token losses
TAIL_POINTS = 120  # thresholds of the survival function


class Grid(NamedTuple):
    """The token losses (nats) at which every distribution is evaluated."""

    bin_edges: NDArray[np.float64]  # [BINS + 1]
    thresholds: NDArray[np.float64]  # [TAIL_POINTS]


def describe(
    loss: Loss, seed: int, run: Run, classes: NDArray[np.int64], examples: NDArray[np.int64]
) -> Json:
    """The record of a run: all of its numbers except the token losses.

    Args:
        classes: the index into `CLASSES` of every token type, [vocabulary].
        examples: the index of the example of each held-out token, [tokens].
    """
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
            **held_out_metrics(run.scores, classes[run.scores.labels], examples),
            **(dict.fromkeys(run.asked) if run.diverged else run.asked),
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
        "train_blocks": len(corpus.train),
        "train_tokens": corpus.training.tokens,
        "learned_tokens": len(corpus.training.learned),
        "held_out_tokens": len(corpus.evaluation.learned),
        "worst_tokens": worst(len(corpus.evaluation.learned)),
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
    tokens = {name: [nll for _, nll in of_loss] for name, of_loss in runs.items()}
    finite = [name for name in runs if not diverged_seeds(records[name])]
    largest = max((nll.max().item() for name in finite for nll in tokens[name]), default=1.0)
    grid = Grid(np.linspace(0, largest, BINS + 1), np.linspace(0, largest, TAIL_POINTS))
    return {
        "baseline": losses[0].name,
        "parameters": baseline[0]["parameters"],
        "grid": {name: points.tolist() for name, points in grid._asdict().items()},
        "losses": [
            {
                **_summary(name, records[name], baseline),
                **_distribution(tokens[name] if name in finite else (), grid),
            }
            for name in runs
        ],
        "pages": {
            loss.name: store.page(loss).relative_to(store.out).as_posix()
            for loss in losses
            if store.page(loss).exists()
        },
        "runs": [record for loss in losses for record in records[loss.name]],
    }


def diverged_seeds(records: Sequence[Json]) -> list[int]:
    return [record["seed"] for record in records if record["diverged"]]


def _summary(name: str, records: Sequence[Json], baseline: Sequence[Json]) -> Json:
    metrics, differences, changes, verdicts = {}, {}, {}, {}
    for metric in measured(METRICS, baseline[0]["metrics"]):
        values = [record["metrics"][metric.key] for record in records]
        reference = [record["metrics"][metric.key] for record in baseline]
        paired, mean = difference(values, reference), estimate(values)
        metrics[metric.key] = mean and mean.as_json()
        if records is not baseline:
            differences[metric.key] = paired
            changes[metric.key] = change(metric, paired, estimate(reference))
            small = negligible(changes[metric.key])
            verdicts[metric.key] = NO_DIFFERENCE if small else verdict(paired, metric.lower_is_better)
    times = {
        time.key: range_of([record["metrics"][time.key] for record in records])
        for time in measured(TIMES, baseline[0]["metrics"])
    }
    clauses = _outcome(records, baseline, changes, verdicts)
    return {
        "name": name,
        "title": in_words(name),
        "diverged_seeds": diverged_seeds(records),
        "metrics": metrics,
        "differences": _as_json(differences),
        "changes": _as_json(changes),
        "verdicts": verdicts,
        "times": _as_json(times),
        "clauses": clauses,
        "sentence": f"{in_words(name)}: {', '.join(clause['text'] for clause in clauses)}",
        "curve": _curve(records),
    }


def cautions(results: Json) -> list[str]:
    """What a reader of the results must know beside them, in sentences."""
    text, losses = results["text"], results["losses"]
    told = []
    if text["worst_tokens"] < SMALL_TAIL:
        told.append(
            f"The held-out text is small, {text['held_out_tokens']:,} tokens, and its worst 5% are "
            f"{text['worst_tokens']}. With more text the numbers may look different, and the intervals do "
            "not cover that."
        )
    rates = {loss["name"]: _spec_and_rate(loss["name"], results["settings"]["lr"]) for loss in losses}
    baseline, _ = rates[results["baseline"]]
    for loss in losses:
        rate = rates[loss["name"]][1]
        if (baseline, rate) not in rates.values():
            title = loss["title"][0].upper() + loss["title"][1:]
            told.append(
                f"{title} is compared with a baseline at another rate. Its difference is that of the loss "
                f"and of the rate: --loss {baseline}@{rate:g} would tell them apart."
            )
    return told


def _spec_and_rate(name: str, usual: float) -> tuple[str, float]:
    spec, _, rate = name.partition("@")
    return spec, float(rate or usual)


def _as_json(found: Mapping[str, Estimate | Range | None]) -> Json:
    return {key: value and value.as_json() for key, value in found.items()}


def _outcome(
    records: Sequence[Json],
    baseline: Sequence[Json],
    changes: Mapping[str, Estimate | None],
    verdicts: Mapping[str, str],
) -> list[Json]:
    """What became of a loss, in clauses: each its text, and the verdict if it has one."""
    if diverged := _diverged(records):
        return [{"text": diverged, "verdict": "worse"}]
    if records is baseline:
        return [{"text": "the baseline", "verdict": None}]
    if diverged := _diverged(baseline):
        return [{"text": f"no comparison, because {baseline[0]['loss']} {diverged}", "verdict": None}]
    metrics = {metric.key: metric for metric in METRICS}
    clauses: list[Json] = [
        {
            "text": change_in_words(
                headline,
                changes[headline.metric],
                verdicts[headline.metric],
                change_unit(metrics[headline.metric]),
            ),
            "verdict": verdicts[headline.metric],
        }
        for headline in HEADLINES
        if headline.metric in changes
    ]
    if len(records) == 1:
        clauses.append({"text": "all of which may be chance: one seed gives no interval", "verdict": None})
    return clauses


def _diverged(records: Sequence[Json]) -> str:
    """`diverged on seeds 0, 2 of 3`; empty if no run did."""
    seeds = diverged_seeds(records)
    named = f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"
    return f"diverged on {named} of {len(records)}" if seeds else ""


def _curve(records: Sequence[Json]) -> list[Json]:
    """The cross-entropy over the seeds, at each step that all of them reached."""
    points = []
    for seeds in zip(*(record["curve"] for record in records), strict=False):
        found = estimate([value for _, value in seeds])
        if found is None:
            break
        points.append({"step": seeds[0][0], **found.as_json()})
    return points


def _distribution(seeds: Sequence[NDArray[np.float32]], grid: Grid) -> Json:
    """Density of the token losses in the grid's bins and their share above each threshold, over the seeds.

    Without seeds, `None` for both.
    """
    # In float64: NumPy would round the edges, and so the widths, to the dtype of the losses.
    densities = [np.histogram(nll.astype(np.float64), grid.bin_edges, density=True)[0] for nll in seeds]
    survivals = [1 - np.searchsorted(np.sort(nll), grid.thresholds, side="right") / nll.size for nll in seeds]
    return {"density": _over_seeds(densities), "survival": _over_seeds(survivals)}


def _over_seeds(curves: Sequence[NDArray[np.float64]]) -> Json | None:
    """The mean of the curves and the half width of its interval, point by point; `None` without curves."""
    points = [estimate(values) for values in zip(*(curve.tolist() for curve in curves), strict=True)]
    found = [point.as_json() for point in points if point]
    return {key: [point[key] for point in found] for key in ("mean", "half_width")} if found else None
