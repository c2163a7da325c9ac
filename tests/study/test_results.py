import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import nvamp.study.compare
from nvamp.study import StudyError
from nvamp.study.corpus import Corpus
from nvamp.study.held_out import TokenScores
from nvamp.study.losses import parse_loss
from nvamp.study.metrics import METRICS, TIMES, measured
from nvamp.study.results import Grid, _distribution, _summary, cautions, describe, describe_corpus
from nvamp.study.settings import Settings
from nvamp.study.training import Run, train
from tests.study.conftest import study


def test_results_are_those_of_the_runs(settings: Settings, tmp_path: Path) -> None:
    results, _ = study(settings, tmp_path)
    assert results == json.loads((tmp_path / "results.json").read_text())
    assert results["baseline"] == "ce"
    ce, dft = results["losses"]
    runs = {(run["loss"], run["seed"]): run["metrics"] for run in results["runs"]}
    for metric in measured(METRICS, runs["ce", 0]):
        values = [runs["dft", seed][metric.key] for seed in (0, 1)]
        differences = [runs["dft", seed][metric.key] - runs["ce", seed][metric.key] for seed in (0, 1)]
        assert dft["metrics"][metric.key]["mean"] == pytest.approx(np.mean(values))
        assert dft["differences"][metric.key]["mean"] == pytest.approx(np.mean(differences))
        half = 12.7062 * np.std(differences, ddof=1) / np.sqrt(2)
        assert dft["differences"][metric.key]["half_width"] == pytest.approx(half, abs=1e-9)
        reference = ce["metrics"][metric.key]["mean"] if metric.unit != "%" else 100
        assert dft["changes"][metric.key]["mean"] == pytest.approx(np.mean(differences) * 100 / reference)
    assert ce["differences"] == ce["changes"] == {}
    for time in measured(TIMES, runs["ce", 0]):
        values = [runs["dft", seed][time.key] for seed in (0, 1)]
        expected = {"median": np.mean(values), "low": min(values), "high": max(values)}
        assert dft["times"][time.key] == pytest.approx(expected)
    assert results["passes"] == 6 * 8 / results["text"]["train_blocks"]
    assert results["text"]["worst_tokens"] == -(-results["text"]["held_out_tokens"] // 20)

    nll = np.stack([np.load(tmp_path / "runs" / f"dft-seed{seed}.npy") for seed in (0, 1)])
    assert nll.mean() == pytest.approx(dft["metrics"]["cross_entropy"]["mean"], rel=1e-5)
    edges, thresholds = np.array(results["grid"]["bin_edges"]), np.array(results["grid"]["thresholds"])
    assert (np.diff(edges) * dft["density"]["mean"]).sum() == pytest.approx(1)
    shares = np.array([(nll > x).mean(1) for x in thresholds])
    np.testing.assert_allclose(dft["survival"]["mean"], shares.mean(1), atol=1e-6)
    spread = 12.7062 * shares.std(1, ddof=1) / np.sqrt(2)
    np.testing.assert_allclose(dft["survival"]["half_width"], spread, atol=1e-6)
    largest = max(loss["metrics"]["max"]["mean"] for loss in results["losses"])
    assert edges[-1] >= largest
    curve = {point["step"]: point for point in dft["curve"]}
    assert list(curve) == [0, 1, 2, 3, 4, 5, 6]
    assert curve[6]["mean"] < curve[0]["mean"]
    ends = [run["curve"][-1][1] for run in results["runs"] if run["loss"] == "dft"]
    assert curve[6]["half_width"] == pytest.approx(12.7062 * np.std(ends, ddof=1) / np.sqrt(2))


def test_the_record_of_a_run() -> None:
    labels, right = np.array([0, 0, 1]), np.array([True, False, False])
    losses = [np.array([1, 2, 4], np.float32), np.array([1, np.nan, 4], np.float32)]
    whole, diverged = (
        describe(
            parse_loss("ce"),
            1,
            Run(
                SimpleNamespace(num_parameters=lambda: 5),
                TokenScores(nll, right, np.array([0, 1, 0]), np.ones(3, np.float32), nll, labels),
                asked={"exact_match": 50.0},
                curve=[(0, 3.0)],
                steps=7,
                tokens_per_second=100.0,
                loss_share=0.25,
                seconds=2.0,
                peak_memory=3_000_000,
                logits_because=None,
            ),
            np.array([0, 2]),
            np.array([0, 0, 0]),
        )
        for nll in losses
    )
    assert (whole["loss"], whole["seed"], whole["parameters"], whole["diverged"]) == ("ce", 1, 5, False)
    found = whole["metrics"]
    assert (found["frequent"], found["mid"], found["rare"]) == (1.5, None, 4.0)
    assert (found["loss_share"], found["peak_memory"], found["exact_match"]) == (25.0, 3.0, 50.0)
    assert diverged["diverged"]
    assert diverged["metrics"]["exact_match"] is None
    assert diverged["metrics"]["loss_share"] == 25.0


def test_a_share_is_above_its_threshold() -> None:
    grid = Grid(np.array([0.0, 2.0, 4.0]), np.array([0.0, 2.0, 4.0]))
    found = _distribution([np.array([1, 2, 2, 4], np.float32)], grid)
    assert found["survival"] == {"mean": [1.0, 0.25, 0.0], "half_width": [None] * 3}
    assert found["density"]["mean"] == [0.125, 0.375]


def test_the_cross_entropy_of_frequencies_by_definition(corpus: Corpus) -> None:
    seen = np.bincount(corpus.train.flatten(), minlength=len(corpus.tokenizer)) + 1  # of Laplace
    expected = -np.log(seen[corpus.held_out[:, 1:].flatten()] / seen.sum()).mean()
    assert describe_corpus(corpus)["unigram_cross_entropy"] == pytest.approx(expected)


def test_more_is_worse_or_better() -> None:
    def records(value: float) -> list[dict[str, Any]]:
        metrics = [{"cross_entropy": value * x, "accuracy": value * x} for x in (1.0, 1.001)]
        return [
            {"loss": "dft", "seed": seed, "diverged": False, "curve": [], "metrics": found}
            for seed, found in enumerate(metrics)
        ]

    found = _summary("dft", records(3.0), records(2.0))
    assert found["verdicts"] == {"cross_entropy": "worse", "accuracy": "better"}
    assert [clause["verdict"] for clause in found["clauses"]] == ["worse", "better"]


def test_a_change_too_small_to_speak_of_is_none() -> None:
    def records(*values: float) -> list[dict[str, Any]]:
        return [
            {"loss": "dft", "seed": i, "diverged": False, "curve": [], "metrics": {"cross_entropy": x}}
            for i, x in enumerate(values)
        ]

    found = _summary("dft", records(3.0002, 3.0001), records(3.0, 3.0))
    assert found["verdicts"] == {"cross_entropy": "no clear difference"}
    assert found["clauses"] == [{"text": "mean the same within 0.026%", "verdict": "no clear difference"}]
    found = _summary("dft", records(3.000011, 3.00001), records(3.0, 3.0))
    assert found["verdicts"] == {"cross_entropy": "no clear difference"}
    assert found["clauses"][0]["text"] == "mean the same within 0.010%"


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["ce", "nvamp"], 0),
        (["ce", "nvamp@0.004"], 1),
        (["ce", "nvamp@0.004", "dft@0.008"], 2),
        (["ce", "ce@0.004", "nvamp@0.004", "dft@0.004"], 0),
        (["ce@0.004", "nvamp"], 1),
        (["ce@0.004", "nvamp@0.004"], 0),
        (["ce", "ce@0.004"], 0),
        (["ce", "nvamp@0.002"], 0),  # the study's own
    ],
)
def test_a_rate_of_its_own_is_said(results: dict[str, Any], names: list[str], told: int) -> None:
    losses = [{**results["losses"][0], "name": name, "title": f"{name}, in words"} for name in names]
    found = cautions({**results, "losses": losses, "baseline": names[0]})
    assert len(found) == told
    if names[1:] == ["nvamp@0.004"] and told:
        assert found[0].startswith("Nvamp@0.004, in words is compared with a baseline at another rate.")
        assert "--loss ce@0.004 would" in found[0]


def test_what_a_loss_did_in_words(settings: Settings, tmp_path: Path) -> None:
    results, _ = study(settings, tmp_path)
    ce, dft = results["losses"]
    assert ce["sentence"] == "cross-entropy: the baseline"
    assert [clause["text"].split()[0] for clause in dft["clauses"]] == ["tail", "mean", "accuracy"]
    assert dft["sentence"] == "DFT: " + ", ".join(clause["text"] for clause in dft["clauses"])
    assert [clause["verdict"] for clause in dft["clauses"]] == [
        dft["verdicts"][key] for key in ("cvar", "cross_entropy", "accuracy")
    ]
    alone, _ = study(replace(settings, seeds=1), tmp_path)
    assert alone["losses"][1]["sentence"].endswith("may be chance: one seed gives no interval")


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
    assert set(dft["metrics"].values()) == {None}
    assert dft["times"]["tokens_per_second"] is not None
    assert dft["diverged_seeds"] == [0]
    assert list(results["pages"]) == ["ce"]
    assert dft["density"] is dft["survival"] is None
    assert [point["step"] for point in dft["curve"]] == [0, 1, 2, 3, 4, 5]
    assert dft["sentence"] == "DFT: diverged on seed 0 of 2"
    assert ce["metrics"]["cross_entropy"]["mean"] > 0


def test_a_diverged_baseline_is_named(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def baseline_diverges(loss: Any, seed: int, *rest: Any) -> Any:
        run = train(loss, seed, *rest)
        if loss.name == "ce":
            run.scores.nll[3] = np.nan
        return run

    monkeypatch.setattr(nvamp.study.compare, "train", baseline_diverges)
    results, _ = study(settings, tmp_path)
    ce, dft = results["losses"]
    assert ce["sentence"] == "cross-entropy: diverged on seeds 0, 1 of 2"
    assert dft["sentence"] == "DFT: no comparison, because ce diverged on seeds 0, 1 of 2"
    assert dft["density"] is not None


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    path = tmp_path / "chats.jsonl"
    rows = ({"prompt": f"{i} and", "completion": " beta gamma"} for i in range(300))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_completions_and_another_text(settings: Settings, chats: Path, tmp_path: Path) -> None:
    asked = replace(
        settings, losses=("ce", "dft"), text=(), dataset=(str(chats),), also=settings.text[0], generate=3
    )
    results, _ = study(asked, tmp_path / "out")
    keys = {"exact_match", "token_f1", "also", "forgotten"}
    ce, dft = (loss["metrics"] for loss in results["losses"])
    assert keys < ce.keys() == dft.keys()
    assert [clause["text"].split()[0] for clause in results["losses"][1]["clauses"]] == [
        "tail", "mean", "accuracy", "exact", "other",
    ]  # fmt: skip
    assert 0 <= ce["exact_match"]["mean"] <= ce["token_f1"]["mean"] <= 100
    runs = {(run["loss"], run["seed"]): run["metrics"] for run in results["runs"]}
    # From one model, with one seed, all losses start at the same number.
    for seed in (0, 1):
        before = [runs[loss, seed]["also"] - runs[loss, seed]["forgotten"] for loss in ("ce", "dft")]
        assert before[0] == pytest.approx(before[1], abs=1e-6)
    assert runs["ce", 0]["forgotten"] != 0
    with pytest.raises(StudyError, match=r"--generate 3 \(now 2\)"):
        study(replace(asked, generate=2), tmp_path / "out")


def test_prompts_that_do_not_fit(settings: Settings, tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    rows = ({"prompt": f"{i}", "completion": " beta gamma" * 20} for i in range(300))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = replace(settings, text=(), dataset=(str(path),), generate=1, sequence=16)
    with pytest.raises(StudyError, match=r"^--generate: no held-out prompt with its answer fits into 16 tok"):
        study(asked, tmp_path / "out")


def test_what_cannot_be_asked(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "short").write_text("alpha")
    for change, message in (
        ({"generate": -1}, "--generate must be at least 0, got -1"),
        ({"generate": 1}, "--generate: expected prompts with answers to complete: --dataset with"),
        ({"also": "/no/such"}, "--also /no/such: no such file or directory"),
        ({"also": __file__ + "/.."}, "--also"),
        ({"also": str(tmp_path / "short"), "sequence": 16}, "--also .*short: the text is too short: not one"),
    ):
        with pytest.raises(StudyError, match=f"^{message}"):
            study(replace(settings, **change), tmp_path / "out")
