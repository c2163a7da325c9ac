import math
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from nvamp.study.metrics import (
    HEADLINES,
    HELD_OUT,
    METRICS,
    TIMES,
    Estimate,
    Headline,
    Range,
    calibration_error,
    change,
    change_in_words,
    change_unit,
    cvar,
    difference,
    estimate,
    held_out_metrics,
    measured,
    negligible,
    range_of,
    verdict,
    worst,
)

LOSSES = st.lists(st.floats(0, 50, width=32), min_size=1, max_size=200)


class Made(NamedTuple):
    """Scores of held-out tokens."""

    nll: NDArray[Any]
    correct: NDArray[np.bool_]
    confidence: NDArray[np.float32]


def made(nll: NDArray[Any], correct: NDArray[np.bool_]) -> Made:
    return Made(nll, correct, np.full(len(nll), 0.5, np.float32))


def zeros(nll: NDArray[Any]) -> NDArray[np.int64]:
    return np.zeros(len(nll), np.int64)


def test_held_out_metrics_by_hand() -> None:
    nll = np.array([1.0, 2.0, 3.0, 6.0], dtype=np.float32)
    scores = Made(nll, np.array([True, False, True, True]), np.array([0.9, 0.2, 0.9, 0.95], np.float32))
    metrics = held_out_metrics(scores, np.array([0, 0, 1, 1]), np.array([7, 7, 7, 2]))
    assert metrics == {
        "cross_entropy": 3.0,
        "perplexity": pytest.approx(math.exp(3)),
        "std": pytest.approx(math.sqrt((4 + 1 + 0 + 9) / 4)),
        "cvar": 6.0,
        "max": 6.0,
        "frequent": 1.5,
        "mid": 4.5,
        "rare": None,
        "accuracy": 75.0,
        # Bins of 0.2, of 0.9 twice and of 0.95: |0.2 - 0| + |1.8 - 2| + |0.95 - 1|
        "calibration_error": pytest.approx(100 * (0.2 + 0.2 + 0.05) / 4),
        "example_mean": 4.0,
        "worst_example": 6.0,
    }


def test_calibration_error() -> None:
    right = np.array([True, False, False, True])
    assert calibration_error(np.full(4, 0.5, np.float32), right) == 0
    assert calibration_error(np.ones(4, np.float32), right) == 0.5  # the last bin holds 1
    assert calibration_error(np.array([1, 0.9375], np.float32), right[1::2]) == (1.9375 - 1) / 2
    confidence = np.array([0.97, 0.97, 0.02, 0.02], np.float32)
    assert calibration_error(confidence, right) == pytest.approx((2 * 0.97 - 1 + 1 - 2 * 0.02) / 4)


@given(LOSSES)
def test_cvar_is_the_mean_of_the_worst_twentieth(losses: list[float]) -> None:
    worst = sorted(losses, reverse=True)[: -(-len(losses) // 20)]
    assert cvar(np.array(losses)) == pytest.approx(sum(worst) / len(worst))


def test_metrics_are_computed_in_float64() -> None:
    nll = np.random.default_rng(0).exponential(3, 100_001).astype(np.float32)
    exact = nll.astype(np.float64)
    found = held_out_metrics(made(nll, nll > 1), zeros(nll), zeros(nll))
    assert (
        found["cross_entropy"] == found["frequent"] == pytest.approx(math.fsum(exact) / len(exact), rel=1e-12)
    )
    assert found["std"] == pytest.approx(exact.std(), rel=1e-12)
    assert found["cvar"] == pytest.approx(math.fsum(np.sort(exact)[-5001:]) / 5001, rel=1e-12)


def test_cvar_of_a_hundred_is_of_five() -> None:
    assert cvar(np.arange(100.0)) == 97.0
    assert cvar(np.arange(101.0)) == pytest.approx(np.mean([95, 96, 97, 98, 99, 100]))
    assert [worst(tokens) for tokens in range(10_000)] == [-(-tokens // 20) for tokens in range(10_000)]


def test_classes_add_up_to_the_whole() -> None:
    rng = np.random.default_rng(0)
    nll, classes = rng.exponential(2, 5000), rng.integers(0, 3, 5000)
    metrics = held_out_metrics(made(nll, nll < 1), classes, zeros(nll))
    shares = np.bincount(classes) / 5000
    of_classes = np.array([metrics["frequent"], metrics["mid"], metrics["rare"]], dtype=float)
    assert (shares * of_classes).sum() == pytest.approx(metrics["cross_entropy"])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_diverged_run_has_no_metrics(bad: float) -> None:
    nll = np.array([1.0, bad])
    metrics = held_out_metrics(made(nll, nll > 0), zeros(nll), zeros(nll))
    assert set(metrics.values()) == {None}
    assert set(metrics) == set(HELD_OUT)


def test_perplexity_beyond_floats_has_no_value() -> None:
    nll = np.array([800.0])
    metrics = held_out_metrics(made(nll, nll > 0), zeros(nll), zeros(nll))
    assert metrics["perplexity"] is None
    assert metrics["cross_entropy"] == 800


@pytest.mark.parametrize("n", [*range(2, 32)])
def test_the_interval_is_students(n: int) -> None:
    # The half width over the standard error is the quantile: Student's density must hold 95% within it.
    values = [0.0] * (n - 1) + [1.0]
    found = estimate(values)
    assert found is not None
    assert found.half_width is not None
    quantile = found.half_width / (np.std(values, ddof=1) / math.sqrt(n))
    df = n - 1
    x = np.linspace(0, quantile, 200_001)
    scale = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(df * math.pi)
    within = 2 * np.trapezoid(scale * (1 + x**2 / df) ** (-(df + 1) / 2), x)
    assert within == pytest.approx(0.95, abs=1e-6)


def test_beyond_the_table_the_interval_is_not_too_narrow() -> None:
    found = estimate([0.0, 1.0] * 50)
    assert found is not None
    assert found.half_width is not None
    error = np.std([0.0, 1.0] * 50, ddof=1) / 10
    assert 1.984 * error < found.half_width < 2.05 * error


def test_one_seed_has_no_interval() -> None:
    assert estimate([3.0]) == Estimate(3.0, None)


@pytest.mark.parametrize("values", [[1.0, None], [1.0, math.nan], [None], []])
def test_no_mean_over_the_seeds_that_happened_to_survive(values: list[float | None]) -> None:
    assert estimate(values) is None


def test_differences_are_paired() -> None:
    # The seeds differ by far more than the losses; pairing takes that out.
    found = difference([1.1, 5.2, 9.3], [1.0, 5.0, 9.0])
    assert found is not None
    assert found.mean == pytest.approx(0.2)
    assert found.half_width == pytest.approx(4.30265 * 0.1 / math.sqrt(3))


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=10))
def test_a_loss_does_not_differ_from_itself(values: list[float]) -> None:
    found = difference(values, values)
    assert found == Estimate(0.0, 0.0)
    assert verdict(found, lower_is_better=True) == "no clear difference"


@pytest.mark.parametrize(
    ("found", "lower", "higher"),
    [
        (Estimate(-1.0, 0.5), "better", "worse"),
        (Estimate(1.0, 0.5), "worse", "better"),
        (Estimate(-1.0, 1.0), "no clear difference", "no clear difference"),
        (Estimate(-1.0, 1.5), "no clear difference", "no clear difference"),
        (Estimate(1.0, 1.5), "no clear difference", "no clear difference"),
        (Estimate(-1.0, None), "one seed, no interval", "one seed, no interval"),
        (None, "no value", "no value"),
    ],
)
def test_verdicts(found: Estimate | None, lower: str, higher: str) -> None:
    assert verdict(found, lower_is_better=True) == lower
    assert verdict(found, lower_is_better=False) == higher


@pytest.mark.parametrize(
    ("mean", "half", "sign", "text"),
    [
        (-1.23456, 0.1, "", "−1.23 ± 0.10"),
        (5.1, 0.0123, "", "5.100 ± 0.012"),
        (0.00012, 0.00034, "+", "+0.00012 ± 0.00034"),
        (-0.00001, 0.5, "+", "0.00 ± 0.50"),
        (-2e-9, 1e-9, "+", "−2.0e−09 ± 1.0e−09"),
        (0.0, 0.0, "+", "0.000 ± 0"),
        (12345.6, 234.5, "", "12,346 ± 234"),
        (0.5, None, "+", "+0.500"),
        (-0.000123, None, "+", "−0.00012"),
        (5.12345, None, "", "5.123"),
    ],
)
def test_how_a_number_is_shown(mean: float, half: float | None, sign: str, text: str) -> None:
    assert METRICS[0].shown({"mean": mean, "half_width": half}, sign) == text


def test_what_has_no_value_is_shown_as_a_dash() -> None:
    assert METRICS[0].shown(None) == TIMES[0].shown_range(None) == "–"


def test_a_range_is_shown() -> None:
    found = range_of([7300.0, 7100.4, 9000.0])
    assert found == Range(7300.0, 7100.4, 9000.0)
    assert TIMES[0].shown_range(found.as_json()) == "7,300 (7,100 to 9,000)"
    assert TIMES[0].shown_range({"median": 3.0, "low": 3.0, "high": 3.0}) == "3"
    assert range_of([1.0, None]) is None


TAIL, MEAN, ACCURACY, *_ = HEADLINES
ESTIMATES = {metric.key: metric for metric in METRICS}


def test_a_change_is_in_percent_or_points() -> None:
    assert change(ESTIMATES["cvar"], Estimate(-0.5, 0.1), Estimate(10.0, 1.0)) == Estimate(-5.0, 1.0)
    assert change(ESTIMATES["cvar"], Estimate(-0.5, None), Estimate(10.0, None)) == Estimate(-5.0, None)
    assert change(ESTIMATES["accuracy"], Estimate(2.0, 1.0), Estimate(50.0, 1.0)) == Estimate(2.0, 1.0)
    forgotten = change(ESTIMATES["forgotten"], Estimate(-0.5, 0.1), Estimate(-10.0, 1.0))
    assert forgotten == Estimate(-5.0, 1.0)  # less is less, of a negative number too
    assert change(ESTIMATES["cvar"], None, Estimate(10.0, 1.0)) is None
    assert change(ESTIMATES["cvar"], Estimate(1.0, 1.0), Estimate(0.0, 1.0)) is None


@pytest.mark.parametrize(
    ("headline", "found", "word", "text"),
    [
        (TAIL, Estimate(-4.81, 1.0), "better", "tail 4.8% lighter"),
        (TAIL, Estimate(12.3, 1.0), "worse", "tail 12% heavier"),
        (MEAN, Estimate(0.834, 0.1), "worse", "mean 0.83% higher"),
        (ACCURACY, Estimate(-0.1, 0.2), "no clear difference", "accuracy the same within 0.30 points"),
        (MEAN, Estimate(0.5, 0.5), "no clear difference", "mean the same within 1.0%"),
        (MEAN, Estimate(1.0, 3.0), "no clear difference", "mean unclear (−2.0 to +4.0%)"),
        (MEAN, Estimate(-1.0, None), "one seed, no interval", "mean 1.0% lower"),
        (MEAN, Estimate(0.0, 0.0), "no clear difference", "mean the same"),
        (MEAN, Estimate(0.0, None), "one seed, no interval", "mean the same"),
        (
            MEAN,
            Estimate(0.25, 0.0),
            "no clear difference",
            "mean 0.25% higher with every seed, which may be chance",
        ),
        (MEAN, Estimate(-2e-5, 1e-5), "no clear difference", "mean the same within 0.010%"),
        (MEAN, None, "no value", "mean without a value"),
    ],
)
def test_a_change_in_words(headline: Headline, found: Estimate | None, word: str, text: str) -> None:
    assert change_in_words(headline, found, word, change_unit(ESTIMATES[headline.metric])) == text


def test_every_metric_is_known() -> None:
    keys = [metric.key for metric in METRICS]
    assert set(HELD_OUT) < set(keys)
    assert measured(METRICS, dict.fromkeys(HELD_OUT)) == [ESTIMATES[key] for key in keys if key in HELD_OUT]


def test_seeds_that_agree_to_the_digit_prove_nothing() -> None:
    found = difference([3.9, 3.9], [3.8, 3.8])  # one token of a thousand more that is right, twice
    assert found is not None
    assert found.half_width == pytest.approx(0, abs=1e-12)
    assert verdict(Estimate(found.mean, 0.0), lower_is_better=False) == "no clear difference"


@pytest.mark.parametrize(
    ("change", "small"),
    [
        (Estimate(0.006, 0.003), True),
        (Estimate(-0.006, 0.003), True),
        (Estimate(0.006, 0.005), False),
        (Estimate(0.006, None), False),
        (None, False),
    ],
)
def test_a_change_too_small_to_speak_of(change: Estimate | None, small: bool) -> None:
    assert negligible(change) is small
