import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import nvamp.study.compare
from nvamp.study import StudyError
from nvamp.study.compare import Settings
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
