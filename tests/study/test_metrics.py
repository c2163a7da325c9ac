import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nvamp.study.metrics import (
    METRICS,
    Estimate,
    cvar,
    difference,
    estimate,
    held_out_metrics,
    verdict,
)

LOSSES = st.lists(st.floats(0, 50, width=32), min_size=1, max_size=200)


def test_held_out_metrics_by_hand() -> None:
    nll = np.array([1.0, 2.0, 3.0, 6.0], dtype=np.float32)
    metrics = held_out_metrics(nll, np.array([True, False, True, True]), np.array([0, 0, 1, 1]))
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
    }


@given(LOSSES)
def test_cvar_is_the_mean_of_the_worst_twentieth(losses: list[float]) -> None:
    worst = sorted(losses, reverse=True)[: -(-len(losses) // 20)]
    assert cvar(np.array(losses)) == pytest.approx(sum(worst) / len(worst))


def test_metrics_are_computed_in_float64() -> None:
    nll = np.random.default_rng(0).exponential(3, 100_001).astype(np.float32)
    exact = nll.astype(np.float64)
    found = held_out_metrics(nll, nll > 1, np.zeros(len(nll), np.int64))
    assert (
        found["cross_entropy"] == found["frequent"] == pytest.approx(math.fsum(exact) / len(exact), rel=1e-12)
    )
    assert found["std"] == pytest.approx(exact.std(), rel=1e-12)
    assert found["cvar"] == pytest.approx(math.fsum(np.sort(exact)[-5001:]) / 5001, rel=1e-12)


def test_cvar_of_a_hundred_is_of_five() -> None:
    assert cvar(np.arange(100.0)) == 97.0
    assert cvar(np.arange(101.0)) == pytest.approx(np.mean([95, 96, 97, 98, 99, 100]))


def test_classes_add_up_to_the_whole() -> None:
    rng = np.random.default_rng(0)
    nll, classes = rng.exponential(2, 5000), rng.integers(0, 3, 5000)
    metrics = held_out_metrics(nll, nll < 1, classes)
    shares = np.bincount(classes) / 5000
    of_classes = np.array([metrics["frequent"], metrics["mid"], metrics["rare"]], dtype=float)
    assert (shares * of_classes).sum() == pytest.approx(metrics["cross_entropy"])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_diverged_run_has_no_metrics(bad: float) -> None:
    metrics = held_out_metrics(np.array([1.0, bad]), np.array([True, True]), np.array([0, 0]))
    assert set(metrics.values()) == {None}
    assert set(metrics) == {metric.key for metric in METRICS} - {
        "tokens_per_second",
        "loss_share",
        "peak_memory",
    }


def test_perplexity_beyond_floats_has_no_value() -> None:
    metrics = held_out_metrics(np.array([800.0]), np.array([True]), np.array([0]))
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
        (Estimate(-1.0, 1.5), "no clear difference", "no clear difference"),
        (Estimate(1.0, 1.5), "no clear difference", "no clear difference"),
        (Estimate(-1.0, None), "one seed, no interval", "one seed, no interval"),
        (None, "no value", "no value"),
    ],
)
def test_verdicts(found: Estimate | None, lower: str, higher: str) -> None:
    assert verdict(found, lower_is_better=True) == lower
    assert verdict(found, lower_is_better=False) == higher


def test_how_a_number_is_shown() -> None:
    metric = METRICS[0]
    assert metric.shown({"mean": -1.23456, "half_width": 0.1}) == "−1.235 ± 0.100"
    assert metric.shown({"mean": 0.5, "half_width": None}, "+") == "+0.500"
    assert metric.shown(None) == "–"
