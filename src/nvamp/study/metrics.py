"""Held-out numbers of a run, their mean and interval over seeds, and paired differences between losses."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import ceil, exp, isfinite, sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nvamp.study.corpus import CLASSES

TAIL = 0.05  # the share of tokens, the worst ones, that CVaR averages


@dataclass(frozen=True)
class Metric:
    """A number of a run: its label, its unit ("" for none), its decimals, and which direction is better."""

    key: str
    label: str
    unit: str
    decimals: int
    lower_is_better: bool = True

    def shown(self, estimate: Mapping[str, Any] | None, sign: str = "") -> str:
        """Format an `Estimate`, given as JSON, for a table."""
        if estimate is None:
            return "–"
        mean = f"{estimate['mean']:{sign},.{self.decimals}f}".replace("-", "−")
        half = estimate["half_width"]
        return mean if half is None else f"{mean} ± {half:,.{self.decimals}f}"


METRICS = (
    Metric("cross_entropy", "cross-entropy", "nats", 3),
    Metric("perplexity", "perplexity", "", 1),
    Metric("std", "standard deviation", "nats", 3),
    Metric("cvar", "worst-5% mean (CVaR)", "nats", 3),
    Metric("max", "largest token loss", "nats", 2),
    Metric("frequent", "cross-entropy, frequent tokens", "nats", 3),
    Metric("mid", "cross-entropy, mid tokens", "nats", 3),
    Metric("rare", "cross-entropy, rare tokens", "nats", 3),
    Metric("accuracy", "token accuracy", "%", 2, lower_is_better=False),
    Metric("tokens_per_second", "tokens per second", "", 0, lower_is_better=False),
    Metric("loss_share", "share of time in the output layer and loss", "%", 1),
    Metric("peak_memory", "peak memory of a step", "MB", 0),
)
VERDICT_KEYS = ("cross_entropy", "cvar", "max")

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


def held_out_metrics(
    nll: NDArray[Any],
    correct: NDArray[np.bool_],
    classes: NDArray[np.int64],
) -> dict[str, float | None]:
    """The held-out metrics of one run.

    Args:
        nll: token losses in nats, [tokens].
        correct: [tokens] bool.
        classes: the index into `CLASSES` of each label, [tokens].

    Returns:
        The metrics by the keys of `METRICS`. A metric without a value is `None`: all of them if a loss is
        not finite, a class without tokens, a perplexity that overflows. Accuracy is in percent.
    """
    nll = nll.astype(np.float64)
    if not np.isfinite(nll).all():
        return dict.fromkeys(("cross_entropy", "perplexity", "std", "cvar", "max", *CLASSES, "accuracy"))
    mean = nll.mean().item()
    of_class = (nll[classes == index] for index in range(len(CLASSES)))
    return {
        "cross_entropy": mean,
        "perplexity": exp(mean) if mean < 700 else None,
        "std": nll.std().item(),
        "cvar": cvar(nll),
        "max": nll.max().item(),
        **{name: x.mean().item() if x.size else None for name, x in zip(CLASSES, of_class, strict=True)},
        "accuracy": 100 * correct.mean().item(),
    }


def cvar(nll: NDArray[Any]) -> float:
    """The mean of the largest losses, a share `TAIL` of them, rounded up to whole tokens."""
    worst = ceil(round(TAIL * nll.size, 9))
    return float(np.sort(nll)[-worst:].mean())


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


def verdict(difference: Estimate | None, lower_is_better: bool) -> str:
    """What a paired difference says, in a few words."""
    if difference is None:
        return "no value"
    if difference.half_width is None:
        return "one seed, no interval"
    if abs(difference.mean) <= difference.half_width:
        return "no clear difference"
    return "better" if (difference.mean < 0) == lower_is_better else "worse"


def _half_width(values: Sequence[float], mean: float) -> float | None:
    """Half the width of the 95% interval of the mean, by Student's t; `None` for a single value."""
    n = len(values)
    if n < 2:
        return None
    # Beyond the table, its last quantile makes the interval a little too wide, never too narrow.
    t = _T[min(n - 1, len(_T)) - 1]
    return t * sqrt(sum((value - mean) ** 2 for value in values) / (n - 1) / n)
