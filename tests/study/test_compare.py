import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import nvamp.study.compare
from nvamp.study import StudyError
from nvamp.study.compare import Settings, compare, finite, prepare, sentence, write_json
from nvamp.study.inspect import inspect_text
from nvamp.study.metrics import METRICS
from nvamp.study.models import load_model
from nvamp.study.training import Progress, train

HELD_OUT = [metric.key for metric in METRICS if metric.key not in ("tokens_per_second", "loss_share")]


class Silent:
    """A display that remembers what it was told."""

    def __init__(self) -> None:
        self.kept = -1
        self.trained: list[tuple[str, int]] = []

    def prepared(self, corpus: Any, runs: int, kept: int) -> None:
        self.kept = kept

    def run(self, loss: str, seed: int) -> Progress:
        return lambda step, value: None

    def finished(self, record: dict[str, Any]) -> None:
        self.trained.append((record["loss"], record["seed"]))

    def waiting(self) -> None:
        pass


@pytest.fixture
def settings(text_dir: Path, model_dir: Path) -> Settings:
    return Settings(("ce", "dft"), 2, 6, 8, lr=1e-2, noise=0.1, model=str(model_dir), text=(str(text_dir),))


def study(settings: Settings, out: Path, **options: Any) -> tuple[dict[str, Any], Silent]:
    display = Silent()
    results = compare(settings, out, "nvamp compare", display, **options)
    assert results is not None
    return results, display


def without_times(results: dict[str, Any]) -> dict[str, Any]:
    """All results but those that differ from run to run."""
    losses = [
        {
            **loss,
            **{
                kind: {key: loss[kind].get(key) for key in HELD_OUT}
                for kind in ("metrics", "differences", "verdicts")
            },
        }
        for loss in results["losses"]
    ]
    runs = [
        {**run, "seconds": None, "metrics": {key: run["metrics"][key] for key in HELD_OUT}}
        for run in results["runs"]
    ]
    return {**results, "created": None, "settings": None, "losses": losses, "runs": runs}


def test_an_interrupted_study_continues_where_it_was(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(loss: Any, seed: int, *rest: Any) -> Any:
        if (loss.name, seed) == ("dft", 0):
            raise KeyboardInterrupt
        return train(loss, seed, *rest)

    monkeypatch.setattr(nvamp.study.compare, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        study(settings, tmp_path / "a")
    monkeypatch.undo()
    continued, display = study(settings, tmp_path / "a")
    assert display.kept == 1
    assert display.trained == [("dft", 0), ("ce", 1), ("dft", 1)]

    whole, display = study(settings, tmp_path / "b")
    assert display.kept == 0
    assert without_times(continued) == without_times(whole)
    again, display = study(settings, tmp_path / "b")
    assert display.trained == []
    assert without_times(again) == without_times(whole)
    assert again["runs"] == whole["runs"]


def test_an_unfinished_run_is_not_taken_for_a_finished_one(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "save", full_disk)
    with pytest.raises(KeyboardInterrupt):
        study(settings, tmp_path)
    monkeypatch.undo()
    assert not list((tmp_path / "runs").glob("*.json"))
    _, display = study(settings, tmp_path)
    assert display.kept == 0
    assert not list(tmp_path.rglob("*.part"))


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


def test_trained_models_can_be_opened(settings: Settings, tmp_path: Path) -> None:
    study(settings, tmp_path)
    directory = tmp_path / "models" / "dft-seed1"
    model = AutoModelForCausalLM.from_pretrained(directory)
    assert (directory / "model.safetensors").exists()
    assert len(AutoTokenizer.from_pretrained(directory)) == model.config.vocab_size


def test_held_out_text_is_read_by_the_first_model_of_each_loss(settings: Settings, tmp_path: Path) -> None:
    results, _ = study(settings, tmp_path)
    assert results["pages"] == {"ce": "inspect/ce-seed0.html", "dft": "inspect/dft-seed0.html"}
    assert sorted(tmp_path.glob("inspect/*")) == [tmp_path / page for page in results["pages"].values()]
    data = re.search(
        r'<script type="application/json" id="data">(.*?)</script>',
        (tmp_path / results["pages"]["dft"]).read_text(),
    )
    assert data
    page = json.loads(data[1])
    assert page["text"] == prepare(settings).excerpt
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "models" / "dft-seed0")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "models" / "dft-seed0")
    again = inspect_text(model, tokenizer, page["text"])
    assert page["statistics"]["mean"] == pytest.approx(float(again.statistics.mean), rel=1e-6)
    assert page["statistics"]["mean"] == pytest.approx(
        results["runs"][2]["metrics"]["cross_entropy"], rel=0.1
    )


def test_text_that_makes_no_page_is_no_failed_run(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_page(*args: Any) -> None:
        raise StudyError("1 tokens, expected at least 2")

    monkeypatch.setattr(nvamp.study.compare, "inspect_text", no_page)
    results, display = study(settings, tmp_path)
    assert len(display.trained) == 4
    assert results["pages"] == {}


def test_more_losses_and_seeds_may_join(settings: Settings, tmp_path: Path) -> None:
    study(Settings(**{**vars(settings), "losses": ("ce",), "seeds": 1}), tmp_path)
    results, display = study(settings, tmp_path)
    assert display.trained == [("dft", 0), ("ce", 1), ("dft", 1)]
    fewer, display = study(Settings(**{**vars(settings), "losses": ("dft",)}), tmp_path)
    assert display.trained == []
    assert fewer["losses"][0]["metrics"] == results["losses"][1]["metrics"]


def test_runs_of_other_settings_are_not_mixed_in(settings: Settings, tmp_path: Path) -> None:
    changed = Settings(**{**vars(settings), "steps": 5, "noise": 0.0})
    study(Settings(**{**vars(settings), "losses": ("ce",), "seeds": 1}), tmp_path)
    mine = [tmp_path / name for name in ("mine", "models/mine.bin", "runs/notes.json", "inspect/ce.html")]
    for path in mine:
        path.write_text("keep")
    (tmp_path / "models" / "focal-seed7.part").mkdir()  # of a run that was interrupted
    with pytest.raises(StudyError) as error:
        study(changed, tmp_path)
    assert str(error.value) == (
        f"{tmp_path} holds runs of another study: --steps 6 (now 5), --noise 0.1 (now 0.0); "
        "choose another --out, or start anew with --overwrite"
    )
    results, display = study(changed, tmp_path, overwrite=True)
    assert display.kept == 0
    assert {run["steps"] for run in results["runs"]} == {5}
    assert [path.read_text() for path in mine] == ["keep"] * 4
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("content", [None, b"{}", b"[]", b"\xff", b'{"editor.tabSize": 4}'])
def test_a_directory_that_holds_no_study_is_left_alone(
    settings: Settings, tmp_path: Path, content: bytes | None, overwrite: bool
) -> None:
    (tmp_path / "models").mkdir()
    for name in ("models/ce-seed0", "report.html", "results.json"):
        (tmp_path / name).write_text("mine")
    if content is not None:
        (tmp_path / "settings.json").write_bytes(content)
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    with pytest.raises(StudyError, match=f"{tmp_path}.*(not a study's|is damaged)"):
        study(settings, tmp_path, overwrite=overwrite)
    assert {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")} == before


def test_another_model_in_the_same_place_is_another_study(
    settings: Settings, tmp_path: Path, model_dir: Path
) -> None:
    directory = tmp_path / "model"
    shutil.copytree(model_dir, directory)
    one = Settings(**{**vars(settings), "losses": ("ce",), "seeds": 1, "model": str(directory)})
    study(one, tmp_path / "out")
    (directory / "README.md").write_text("Of no weight.")
    assert study(one, tmp_path / "out")[1].kept == 1
    model = load_model(str(directory))
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    model.save_pretrained(directory)
    with pytest.raises(StudyError, match="another study: the content of --model has changed since; choose"):
        study(one, tmp_path / "out")


def test_the_model_that_overwrite_would_drop_is_kept(settings: Settings, tmp_path: Path) -> None:
    model = tmp_path / "models" / "ce-seed0"
    model.mkdir(parents=True)
    with pytest.raises(StudyError, match=f"--model {model} is in --out, which --overwrite would drop"):
        study(Settings(**{**vars(settings), "model": str(model)}), tmp_path, overwrite=True)
    assert model.is_dir()


def test_what_a_study_writes_is_not_its_text(settings: Settings, tmp_path: Path, text_dir: Path) -> None:
    shutil.copytree(text_dir, tmp_path, dirs_exist_ok=True)
    one = Settings(**{**vars(settings), "losses": ("ce",), "seeds": 1, "text": (str(tmp_path),)})
    study(one, tmp_path / "out")
    assert study(one, tmp_path / "out")[1].kept == 1


def test_damaged_runs(settings: Settings, tmp_path: Path) -> None:
    one = Settings(**{**vars(settings), "losses": ("ce",), "seeds": 1})
    study(one, tmp_path)
    record, nll = (tmp_path / "runs" / f"ce-seed0.{suffix}" for suffix in ("json", "npy"))
    nll.unlink()
    assert study(one, tmp_path)[1].trained == [("ce", 0)]
    for path, content in (
        (nll, b""),
        (nll, b"\x93NUMPY"),
        (record, b"{"),
        (record, b"[]"),
        (record, b"\xff"),
    ):
        path.write_bytes(content)
        with pytest.raises(StudyError, match=f"^{path} is damaged: "):
            study(one, tmp_path)


def test_other_text_is_another_study(settings: Settings, tmp_path: Path, text_dir: Path) -> None:
    one = Settings(**{**vars(settings), "losses": ("ce",), "seeds": 1})
    study(one, tmp_path / "out")
    (tmp_path / "more").write_text("entirely different words here " * 20)
    with pytest.raises(StudyError, match="another study: the text has changed since; choose"):
        study(Settings(**{**vars(one), "text": (str(text_dir), str(tmp_path / "more"))}), tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": 0}, "--seeds must be at least 1, got 0"),
        ({"steps": 0}, "--steps must be at least 1, got 0"),
        ({"batch_size": -1}, "--batch-size must be at least 1, got -1"),
        ({"lr": 0.0}, "--lr must be finite and positive, got 0"),
        ({"lr": float("nan")}, "--lr must be finite and positive, got nan"),
        ({"noise": 1.5}, "--noise must be between 0 and 1, got 1.5"),
        ({"losses": ()}, "--loss: expected at least one"),
        ({"dataset": ("some",)}, "--text and --dataset exclude each other"),
        ({"lr": float("inf")}, "--lr must be finite and positive, got inf"),
        ({"text": ("",)}, "--text: expected a name, got an empty one"),
        ({"text": (), "dataset": ("",)}, "--dataset: expected a name, got an empty one"),
        ({"model": ""}, "--model: expected a directory or hub id, got an empty name"),
        ({"batch_size": 10_000}, "--text: the text is too short: "),
        ({"batch_size": 10_000}, "do not fill a batch of 10000"),
        ({"model": "/no/such/model"}, "--model /no/such/model: "),
    ],
)
def test_bad_settings_are_told_in_one_line(
    settings: Settings, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(StudyError) as error:
        study(Settings(**{**vars(settings), **change}), tmp_path / "out")
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_out_that_is_a_file(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StudyError, match=f"--out {tmp_path / 'file'}: "):
        study(settings, tmp_path / "file")


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


def test_json_has_no_nan(tmp_path: Path) -> None:
    write_json(tmp_path / "x", {"a": [float("nan"), (1.5, float("inf"))], "b": np.float64("nan"), "c": "NaN"})
    found = json.loads((tmp_path / "x").read_text(), parse_constant=pytest.fail)
    assert found == {"a": [None, [1.5, None]], "b": None, "c": "NaN"} == finite(found)
