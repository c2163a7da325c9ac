import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

import nvamp.study.compare
import nvamp.study.settings
from nvamp.study import StudyError
from nvamp.study.compare import prepare, recipe_of
from nvamp.study.config import read_config
from nvamp.study.settings import Settings
from nvamp.study.training import train
from tests.study.conftest import study, without_times


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


def test_more_losses_and_seeds_may_join(settings: Settings, one: Settings, tmp_path: Path) -> None:
    study(one, tmp_path)
    results, display = study(settings, tmp_path)
    assert display.trained == [("dft", 0), ("ce", 1), ("dft", 1)]
    assert display.left_out == 0
    fewer, display = study(replace(settings, losses=("dft",)), tmp_path)
    assert display.trained == []
    assert display.left_out == 2  # runs of the report that this one replaces
    assert study(replace(settings, losses=("dft",), seeds=1), tmp_path)[1].left_out == 1
    assert study(settings, tmp_path)[1].left_out == 0
    for damaged in ("{", "[]", '{"runs": [{}]}', '{"runs": 3}'):
        (tmp_path / "results.json").write_text(damaged)
        assert study(settings, tmp_path)[1].left_out == 0
    assert fewer["losses"][0]["metrics"] == results["losses"][1]["metrics"]


def test_the_model_that_overwrite_would_drop_is_kept(settings: Settings, tmp_path: Path) -> None:
    model = tmp_path / "models" / "ce-seed0"
    model.mkdir(parents=True)
    with pytest.raises(StudyError, match=f"--model {model} is in --out, which --overwrite would drop"):
        study(replace(settings, model=str(model)), tmp_path, overwrite=True)
    assert model.is_dir()


def test_what_a_study_writes_is_not_its_text(one: Settings, tmp_path: Path, text_dir: Path) -> None:
    shutil.copytree(text_dir, tmp_path, dirs_exist_ok=True)
    one = replace(one, text=(str(tmp_path),))
    study(one, tmp_path / "out")
    assert study(one, tmp_path / "out")[1].kept == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": 0}, "--seeds must be at least 1, got 0"),
        ({"steps": 0}, "--steps must be at least 1, got 0"),
        ({"batch_size": -1}, "--batch-size must be at least 1, got -1"),
        ({"lr": 0.0}, "--lr must be finite and positive, got 0"),
        ({"lr": float("nan")}, "--lr must be finite and positive, got nan"),
        ({"steps": 2, "epochs": 1.0}, "--steps and --epochs exclude each other"),
        ({"steps": None, "epochs": 0.0}, "--epochs must be finite and positive, got 0"),
        ({"accumulate": 0}, "--accumulate must be at least 1, got 0"),
        ({"sequence": 1}, "--sequence must be at least 2, got 1"),
        ({"sequence": 17}, "--sequence 17: the model takes at most 16 tokens"),
        ({"lora": "x"}, "--lora x: expected r or r,alpha"),
        ({"lora": "8", "model": None}, "--lora adapts a trained model: name one with --model"),
        ({"losses": ("ce@",)}, "--loss ce@: expected a positive learning rate after @, got ''"),
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
        study(replace(settings, **change), tmp_path / "out")
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "change", [{"noise": 0.0}, {"noise": 1.0}, {"sequence": 2}, {"seeds": 1}, {"generate": 0}]
)
def test_the_ends_of_a_range_are_in_it(settings: Settings, change: dict[str, Any]) -> None:
    replace(settings, **change).check()


def test_a_training_text_of_few_tokens(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("a" * 9000 + "".join(map(chr, range(0x4E00, 0x4E00 + 1000))))
    with pytest.raises(
        StudyError, match="too short: 0 training blocks of 64 tokens do not fill a batch of 1"
    ):
        prepare(Settings(("ce",), 1, 1, 1, text=(str(tmp_path / "text"),), sequence=64))


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({"steps": None}, 240),
        ({"steps": 7}, 7),
        ({"steps": None, "epochs": 1.0}, 4),  # 33 examples in batches of 8; the last one is dropped
        ({"steps": None, "epochs": 2.5}, 10),
        ({"steps": None, "epochs": 0.01}, 1),
        ({"steps": None, "epochs": 2.0, "accumulate": 3}, 4),
    ],
)
def test_epochs_are_steps(settings: Settings, changes: dict[str, Any], steps: int) -> None:
    assert recipe_of(replace(settings, **changes), 33).steps == steps


@pytest.mark.parametrize(
    ("changes", "lr"),
    [
        ({"model": None}, 2e-3),
        ({}, 5e-5),
        ({"lora": "8"}, 2e-4),
        ({"lora": "8", "lr": 1e-3}, 1e-3),
    ],
)
def test_learning_rates(settings: Settings, changes: dict[str, Any], lr: float) -> None:
    assert recipe_of(replace(settings, **{"lr": None, **changes}), 33).lr == lr


def test_adapters_need_their_package(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvamp.study.settings, "find_spec", lambda name: None)
    with pytest.raises(StudyError, match=r"^--lora needs peft, .* pip install -e '.*\[lora\]'$"):
        replace(settings, lora="8").check()


def test_a_study_with_every_option(one: Settings, tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "losses": ("ce", "nvamp@0.001"),
        "steps": None,
        "epochs": 0.5,
        "batch_size": 2,
        "accumulate": 2,
        "sequence": 8,
        "lora": "2",
        "bf16": True,
        "gradient_checkpointing": True,
        "loss_on": "all",
        "special_tokens": True,
    }
    everything = replace(one, **changes)
    results, _ = study(everything, tmp_path)
    assert [run["loss"] for run in results["runs"]] == ["ce", "nvamp@0.001"]
    assert {run["logits_because"] for run in results["runs"]} == {None}
    assert results["text"]["sequence"] == 8
    assert (tmp_path / "models" / "nvamp@0.001-seed0" / "model.safetensors").exists()
    assert results["pages"]["nvamp@0.001"] == "inspect/nvamp@0.001-seed0.html"
    for name, plain in (("accumulate", 1), ("sequence", None), ("lora", None), ("bf16", False)):
        with pytest.raises(StudyError, match=f"another study: .*--{name} "):
            study(replace(everything, **{name: plain}), tmp_path)
    with pytest.raises(StudyError, match=r"another study: --gradient-checkpointing True \(now False\); "):
        study(replace(everything, gradient_checkpointing=False), tmp_path)
    fields = {**asdict(everything), "losses": ["ce", "nvamp@0.001"], "text": [*everything.text]}
    written = read_config(tmp_path / "study.toml", [name.replace("_", "-") for name in fields] + ["loss"])
    assert written == {
        {"losses": "loss"}.get(name, name.replace("_", "-")): value for name, value in fields.items() if value
    }
