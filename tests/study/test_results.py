import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nvamp.study.compare
from nvamp.study.compare import Settings
from nvamp.study.metrics import METRICS
from nvamp.study.results import sentence
from nvamp.study.training import train
from tests.study.conftest import HELD_OUT, study


def test_results_are_those_of_the_runs(settings: Settings, tmp_path: Path) -> None:
    results, _ = study(settings, tmp_path)
    assert results == json.loads((tmp_path / "results.json").read_text())
    assert results["baseline"] == "ce"
    ce, dft = results["losses"]
    runs = {(run["loss"], run["seed"]): run["metrics"] for run in results["runs"]}
    for metric in METRICS:
        values = [runs["dft", seed][metric.key] for seed in (0, 1)]
        differences = [runs["dft", seed][metric.key] - runs["ce", seed][metric.key] for seed in (0, 1)]
        assert dft["metrics"][metric.key]["mean"] == pytest.approx(np.mean(values))
        assert dft["differences"][metric.key]["mean"] == pytest.approx(np.mean(differences))
        half = 12.7062 * np.std(differences, ddof=1) / np.sqrt(2)
        assert dft["differences"][metric.key]["half_width"] == pytest.approx(half, abs=1e-9)
    assert ce["differences"] == {}

    nll = np.concatenate([np.load(tmp_path / "runs" / f"dft-seed{seed}.npy") for seed in (0, 1)])
    assert nll.mean() == pytest.approx(dft["metrics"]["cross_entropy"]["mean"], rel=1e-5)
    edges, thresholds = np.array(results["grid"]["bin_edges"]), np.array(results["grid"]["thresholds"])
    assert (np.diff(edges) * dft["density"]).sum() == pytest.approx(1)
    np.testing.assert_allclose(dft["survival"], [(nll > x).mean() for x in thresholds], atol=1e-6)
    largest = max(loss["metrics"]["max"]["mean"] for loss in results["losses"])
    assert edges[-1] >= largest
    curve = {point["step"]: point for point in dft["curve"]}
    assert list(curve) == [0, 1, 2, 3, 4, 5, 6]
    assert curve[6]["low"] <= curve[6]["mean"] <= curve[6]["high"] < curve[0]["mean"]


def records(losses: str, diverged: Sequence[int] = ()) -> list[dict[str, Any]]:
    return [{"loss": losses, "seed": seed, "diverged": seed in diverged} for seed in range(3)]


def test_sentences() -> None:
    ce, nvamp = records("ce"), records("nvamp")
    differences = {
        "cross_entropy": {"mean": -0.01, "half_width": 0.02},
        "cvar": {"mean": -0.3, "half_width": 0.1},
        "max": {"mean": 0.5, "half_width": None},
    }
    verdicts = {"cross_entropy": "no clear difference", "cvar": "better", "max": "one seed, no interval"}
    assert sentence("nvamp", nvamp, ce, differences, verdicts) == (
        "nvamp against ce: cross-entropy: no clear difference (−0.010 nats, 95% interval −0.030 to +0.010); "
        "worst-5% mean (CVaR): better (−0.300 nats, 95% interval −0.400 to −0.200); "
        "largest token loss: one seed, no interval (+0.500 nats)."
    )
    assert sentence("nvamp", records("nvamp", [1]), ce, {}, {}) == (
        "nvamp diverged on seed 1 of 3: no verdict on nvamp."
    )
    assert sentence("nvamp", nvamp, records("ce", [0, 2]), {}, {}) == (
        "ce diverged on seed 0, 2 of 3: no verdict on nvamp."
    )
    assert "compared to" in sentence("ce", ce, ce, {}, {})


def test_a_diverged_loss_has_no_numbers_and_no_verdict(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def one_diverges(loss: Any, seed: int, *rest: Any) -> Any:
        run = train(loss, seed, *rest)
        if (loss.name, seed) == ("dft", 0):
            run.nll[3] = np.nan
            run.curve[-1] = (6, float("nan"))
        return run

    monkeypatch.setattr(nvamp.study.compare, "train", one_diverges)
    results, _ = study(settings, tmp_path)
    ce, dft = results["losses"]
    assert {dft["metrics"][key] for key in HELD_OUT} == {None}
    assert dft["metrics"]["tokens_per_second"] is not None
    assert dft["diverged_seeds"] == [0]
    assert list(results["pages"]) == ["ce"]
    assert dft["density"] is dft["survival"] is None
    assert [point["step"] for point in dft["curve"]] == [0, 1, 2, 3, 4, 5]
    assert dft["sentence"] == "dft diverged on seed 0 of 2: no verdict on dft."
    assert ce["metrics"]["cross_entropy"]["mean"] > 0
