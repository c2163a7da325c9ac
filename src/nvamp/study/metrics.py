"""Held-out numbers of a run, their mean and interval over seeds, and paired differences between losses."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import ceil, exp, floor, isfinite, log10, sqrt
from statistics import median
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from nvamp.study.corpus import CLASSES

TAIL = 0.05  # the share of tokens, the worst ones, that CVaR averages
SMALL_TAIL = 100  # if it has fewer tokens, a study warns that its text is small


@dataclass(frozen=True)
class Metric:
    """A number of a run.

    Attributes:
        unit: "" for none.
        decimals: the least to show of a number that has no interval.
        meaning: what it is, for readers who do not know its name.
    """

    key: str
    label: str
    unit: str
    decimals: int
    meaning: str
    lower_is_better: bool = True

    def shown(self, estimate: Mapping[str, Any] | None, sign: str = "") -> str:
        """Format an `Estimate`, given as JSON, with two significant digits of its interval."""
        if estimate is None:
            return "–"
        mean, half = estimate["mean"], estimate["half_width"]
        # Without an interval a difference, which has a sign, needs two digits of its own.
        decimals = _decimals(half) if half else max(self.decimals, _decimals(mean) if sign else 0)
        text = number(mean, decimals, sign)
        return text if half is None else f"{text} ± {number(half, decimals) if half else 0}"

    def shown_range(self, found: Mapping[str, Any] | None) -> str:
        """Format a `Range`, given as JSON."""
        if found is None:
            return "–"
        middle, low, high = (number(found[key], self.decimals) for key in ("median", "low", "high"))
        return middle if low == high else f"{middle} ({low} to {high})"


METRICS = (
    Metric(
        "cross_entropy",
        "cross-entropy",
        "nats",
        3,
        "The mean of the token losses: −log of the probability that the model gave to the token.",
    ),
    Metric("perplexity", "perplexity", "", 1, "The exponential of the cross-entropy."),
    Metric("std", "standard deviation", "nats", 3, "How far the token losses spread around their mean."),
    Metric(
        "cvar",
        "worst-5% mean (CVaR)",
        "nats",
        3,
        "The mean of the largest 5% of the token losses: the tail. CVaR is conditional value at risk.",
    ),
    Metric("max", "largest token loss", "nats", 2, "One single token, which varies accordingly."),
    Metric(
        "frequent",
        "cross-entropy, frequent tokens",
        "nats",
        3,
        "The mean over tokens of the types that make up the first half of the training text.",
    ),
    Metric("mid", "cross-entropy, mid tokens", "nats", 3, "The mean over the types of its next 40%."),
    Metric("rare", "cross-entropy, rare tokens", "nats", 3, "The mean over the types of its last 10%."),
    Metric(
        "accuracy",
        "token accuracy",
        "%",
        2,
        "How often the likeliest token is the one in the text.",
        lower_is_better=False,
    ),
    Metric(
        "calibration_error",
        "calibration error",
        "%",
        2,
        "How far the probability of the likeliest token is from how often it is right, over 15 bins.",
    ),
    Metric(
        "example_mean",
        "example mean",
        "nats",
        3,
        "The mean over examples, each counted once, however long; those of a text are its blocks.",
    ),
    Metric("worst_example", "worst example", "nats", 2, "The largest mean loss of an example."),
    # Of a study that asks for them:
    Metric(
        "exact_match",
        "exact match",
        "%",
        1,
        "How often the greedy completion of a held-out prompt is the answer.",
        lower_is_better=False,
    ),
    Metric(
        "token_f1",
        "token F1",
        "%",
        1,
        "How well the words of the greedy completion of a held-out prompt agree with those of the answer.",
        lower_is_better=False,
    ),
    Metric("also", "cross-entropy, other text", "nats", 3, "The mean token loss on the text of --also."),
    Metric(
        "forgotten",
        "its rise in training",
        "nats",
        3,
        "By how much the cross-entropy on the text of --also is higher than before training.",
    ),
)
# Other work on the machine changes these: they are shown as median and range, and never compared.
TIMES = (
    Metric(
        "tokens_per_second",
        "tokens per second",
        "",
        0,
        "The tokens of a step over the time of the median one.",
        lower_is_better=False,
    ),
    Metric(
        "loss_share",
        "share of time in the output layer and loss",
        "%",
        1,
        "The share of a step that the output layer, the loss and their gradients take.",
    ),
    Metric("peak_memory", "peak memory of a step", "MB", 0, "The most memory in use at once during a step."),
)


# The keys of the metrics that every study has.
HELD_OUT = (
    "cross_entropy",
    "perplexity",
    "std",
    "cvar",
    "max",
    *CLASSES,
    "accuracy",
    "calibration_error",
    "example_mean",
    "worst_example",
)


def measured(metrics: Sequence[Metric], found: Mapping[str, Any]) -> list[Metric]:
    """The metrics that a study has, given the numbers of one of its losses."""
    return [metric for metric in metrics if metric.key in found]


class Headline(NamedTuple):
    """A metric that the lines at the top of a report are about: a noun, and what less and more of it is."""

    metric: str
    noun: str
    less: str = "lower"
    more: str = "higher"


HEADLINES = (
    Headline("cvar", "tail", "lighter", "heavier"),
    Headline("cross_entropy", "mean"),
    Headline("accuracy", "accuracy"),
    Headline("exact_match", "exact match"),
    Headline("also", "other text"),
)
SAME = 1.0  # percent or points: a change whose interval lies within this is called none
NEGLIGIBLE = 0.01  # the same for one whose interval does not hold zero
NO_DIFFERENCE = "no clear difference"

CALIBRATION_BINS = 15


class Scores(Protocol):
    """What a model makes of held-out tokens.

    Attributes:
        nll: their losses in nats, [tokens] float32.
        correct: whether the likeliest token is the label, [tokens] bool.
        confidence: the probability of the likeliest token, [tokens] float32.
    """

    @property
    def nll(self) -> NDArray[np.float32]: ...
    @property
    def correct(self) -> NDArray[np.bool_]: ...
    @property
    def confidence(self) -> NDArray[np.float32]: ...


# fmt: off
# 97.5% quantiles of Student's t for 1 to 30 degrees of freedom.
_T = (
    12.70620, 4.30265, 3.18245, 2.77645, 2.57058, 2.44691, 2.36462, 2.30600, 2.26216, 2.22814,
    2.20099, 2.17881, 2.16037, 2.14479, 2.13145, 2.11991, 2.10982, 2.10092, 2.09302, 2.08596,
    2.07961, 2.07387, 2.06866, 2.06390, 2.05954, 2.05553, 2.05183, 2.04841, 2.04523, 2.04227,
)
# fmt: on


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and its 95% interval, mean ± half_width; `half_width` is `None` for a single seed."""

    mean: float
    half_width: float | None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Range:
    """The median of the seeds, the lowest and the highest."""

    median: float
    low: float
    high: float

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def held_out_metrics(
    scores: Scores, classes: NDArray[np.int64], examples: NDArray[np.int64]
) -> dict[str, float | None]:
    """The held-out metrics of one run.

    Args:
        classes: the index into `CLASSES` of each label, [tokens].
        examples: the index of the example of each token, [tokens].

    Returns:
        The metrics by the keys of `HELD_OUT`. A metric without a value is `None`: all of them if a loss is
        not finite, a class without tokens, a perplexity that overflows.
    """
    nll = scores.nll.astype(np.float64)
    if not np.isfinite(nll).all():
        return dict.fromkeys(HELD_OUT)
    mean = nll.mean().item()
    of_class = (nll[classes == index] for index in range(len(CLASSES)))
    means = example_means(nll, examples)
    return {
        "cross_entropy": mean,
        "perplexity": exp(mean) if mean < 700 else None,
        "std": nll.std().item(),
        "cvar": cvar(nll),
        "max": nll.max().item(),
        **{name: x.mean().item() if x.size else None for name, x in zip(CLASSES, of_class, strict=True)},
        "accuracy": 100 * scores.correct.mean().item(),
        "calibration_error": 100 * calibration_error(scores.confidence, scores.correct),
        "example_mean": means.mean().item(),
        "worst_example": means.max().item(),
    }


def example_means(nll: NDArray[np.float64], examples: NDArray[np.int64]) -> NDArray[np.float64]:
    """The mean of each example's token losses, [examples], given the example of each token, [tokens]."""
    _, index, tokens = np.unique(examples, return_inverse=True, return_counts=True)
    sums = np.asarray(np.bincount(index, weights=nll), np.float64)
    means: NDArray[np.float64] = sums / tokens
    return means


def calibration_error(confidence: NDArray[np.float32], correct: NDArray[np.bool_]) -> float:
    """The expected calibration error: the mean distance of confidence and accuracy, bin by bin.

    The bins are equally wide, and each has the weight of its tokens.

    Args:
        confidence: the probability of the likeliest token, [tokens].
        correct: whether that is the label, [tokens].

    References:
        Guo et al., On Calibration of Modern Neural Networks, 2017: https://arxiv.org/abs/1706.04599
    """
    bins = np.minimum((confidence * CALIBRATION_BINS).astype(np.int64), CALIBRATION_BINS - 1)
    gaps = np.bincount(bins, weights=confidence.astype(np.float64) - correct)
    return float(np.abs(gaps).sum() / confidence.size)


def cvar(nll: NDArray[Any]) -> float:
    """The mean of the largest losses, a share `TAIL` of them, rounded up to whole tokens."""
    return float(np.sort(nll)[-worst(nll.size) :].mean())


def worst(tokens: int) -> int:
    """The number of token losses in the tail of so many."""
    return ceil(TAIL * tokens)


def estimate(values: Sequence[float | None]) -> Estimate | None:
    """Mean and interval over seeds; `None` if any seed has no value: dropping it would flatter the loss."""
    finite = [value for value in values if value is not None and isfinite(value)]
    if not finite or len(finite) < len(values):
        return None
    mean = sum(finite) / len(finite)
    return Estimate(mean, _half_width(finite, mean))


def difference(values: Sequence[float | None], baseline: Sequence[float | None]) -> Estimate | None:
    """`values − baseline`, seed by seed."""
    pairs = zip(values, baseline, strict=True)
    return estimate([None if a is None or b is None else a - b for a, b in pairs])


def range_of(values: Sequence[float | None]) -> Range | None:
    """Median and range over seeds; `None` if any seed has no value."""
    finite = [value for value in values if value is not None and isfinite(value)]
    if not finite or len(finite) < len(values):
        return None
    return Range(median(finite), min(finite), max(finite))


def change(metric: Metric, difference: Estimate | None, baseline: Estimate | None) -> Estimate | None:
    """A paired difference in percent of the baseline's mean, or in points if the metric is in percent."""
    if difference is None or baseline is None or metric.unit == "%":
        return difference
    if baseline.mean == 0:
        return None
    scale = 100 / abs(baseline.mean)
    half = difference.half_width
    return Estimate(scale * difference.mean, None if half is None else scale * half)


def negligible(change: Estimate | None) -> bool:
    """Whether a change, in percent or points, is too small to speak of wherever it lies in its interval."""
    return (
        change is not None
        and change.half_width is not None
        and abs(change.mean) + change.half_width <= NEGLIGIBLE
    )


def change_unit(metric: Metric) -> str:
    return " points" if metric.unit == "%" else "%"


def change_in_words(headline: Headline, change: Estimate | None, verdict: str, unit: str) -> str:
    """A change in a few words: `tail 4.8% lighter`, `accuracy the same within 0.3 points`."""
    noun = headline.noun
    if change is None:
        return f"{noun} without a value"
    half = change.half_width
    moved = f"{short(abs(change.mean))}{unit} {headline.less if change.mean < 0 else headline.more}"
    if half == 0 and change.mean and verdict not in ("better", "worse"):
        return f"{noun} {moved} with every seed, which may be chance"
    if half is not None and verdict not in ("better", "worse"):
        low, high = change.mean - half, change.mean + half
        within = max(-low, high)
        if within == 0:
            return f"{noun} the same"
        if within <= SAME:
            return f"{noun} the same within {short(max(within, NEGLIGIBLE))}{unit}"
        return f"{noun} unclear ({short(low, '+')} to {short(high, '+')}{unit})"
    if change.mean == 0:
        return f"{noun} the same"
    return f"{noun} {moved}"


def verdict(difference: Estimate | None, lower_is_better: bool) -> str:
    """What a paired difference says, in a few words."""
    if difference is None:
        return "no value"
    if difference.half_width is None:
        return "one seed, no interval"
    # Of a coarse metric, such as one token more that is right, all seeds may have the same by chance.
    if difference.half_width == 0 or abs(difference.mean) <= difference.half_width:
        return NO_DIFFERENCE
    return "better" if (difference.mean < 0) == lower_is_better else "worse"


def _half_width(values: Sequence[float], mean: float) -> float | None:
    """Half the width of the 95% interval of the mean, by Student's t; `None` for a single value."""
    n = len(values)
    if n < 2:
        return None
    # Beyond the table, its last quantile makes the interval a little too wide, never too narrow.
    t = _T[min(n - 1, len(_T)) - 1]
    return t * sqrt(sum((value - mean) ** 2 for value in values) / (n - 1) / n)


def number(value: float, decimals: int, sign: str = "") -> str:
    """A number with so many decimals, in scientific notation if they are many; a zero has no sign."""
    text = f"{value:{sign},.{decimals}f}" if decimals <= 6 else f"{value:{sign}.1e}"
    if not text.strip("+-0.,"):
        text = text.lstrip("+-")
    return text.replace("-", "−")


def short(value: float, sign: str = "") -> str:
    """A number with two significant digits."""
    return number(value, _decimals(value), sign)


def _decimals(value: float) -> int:
    """The decimals that show two significant digits of a number."""
    return max(0, 1 - floor(log10(abs(value)))) if value else 0
