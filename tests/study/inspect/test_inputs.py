"""What `nvamp inspect` is asked for, before PyTorch is there."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, processors

from nvamp.study import StudyError
from nvamp.study.corpus import END_OF_TEXT
from nvamp.study.inspect.inputs import Inputs, link, read_inputs
from nvamp.study.inspect.page import inspect_models
from tests.processes import python
from tests.study.conftest import words

LOSSES = ("nvamp", "ce", "dft")  # not in alphabetical order


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text"
    path.write_text(words(1, 30))
    return path


@pytest.fixture
def study(tmp_path: Path, model_dir: Path) -> Path:
    """The directory of a study with two seeds, as `nvamp compare` leaves it."""
    out = tmp_path / "study"
    (out / "runs").mkdir(parents=True)
    runs = [{"loss": loss, "seed": seed} for loss in LOSSES for seed in (0, 1)]
    for run in runs:
        name = f"{run['loss']}-seed{run['seed']}"
        shutil.copytree(model_dir, out / "models" / name)
        (out / "runs" / f"{name}.json").write_text(json.dumps(run))
    (out / "settings.json").write_text('{"nvamp": "0", "--steps": 1}')
    (out / "results.json").write_text(json.dumps({"runs": runs}))
    (out / "report.html").write_text("")
    return out


def names(inputs: Inputs) -> list[str]:
    return [subject.name for subject in inputs.subjects]


def test_a_study_is_its_first_models_with_the_baseline_first(study: Path, text: Path, tmp_path: Path) -> None:
    inputs = read_inputs([str(study)], text, tmp_path / "page.html")
    assert names(inputs) == ["nvamp, seed 0", "ce, seed 0", "dft, seed 0"]
    assert {subject.report for subject in inputs.subjects} == {study / "report.html"}
    assert [subject.trained for subject in inputs.subjects] == list(LOSSES)


def test_a_study_without_results_is_in_the_order_of_names(study: Path, text: Path, tmp_path: Path) -> None:
    (study / "results.json").unlink()
    inputs = read_inputs([str(study)], text, tmp_path / "page.html")
    assert names(inputs) == ["ce, seed 0", "dft, seed 0", "nvamp, seed 0"]


def test_a_model_knows_its_study(
    study: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(study / "models" / "ce-seed1")
    (subject,) = read_inputs(["../dft-seed1"], text, tmp_path / "page.html").subjects
    assert (subject.name, subject.trained) == ("dft, seed 1", "dft")
    assert subject.report
    assert subject.report.samefile(study / "report.html")
    (study / "report.html").unlink()
    (subject,) = read_inputs(["../dft-seed1"], text, tmp_path / "page.html").subjects
    assert subject.report is None


def test_a_loss_with_a_learning_rate(study: Path, text: Path, tmp_path: Path) -> None:
    (study / "runs" / "ce-seed0.json").write_text('{"loss": "ce@0.001", "seed": 0}')
    (subject,) = read_inputs([str(study / "models" / "ce-seed0")], text, tmp_path / "page.html").subjects
    assert (subject.name, subject.trained) == ("ce@0.001, seed 0", "ce")


def test_models_from_elsewhere_are_told_apart(model_dir: Path, text: Path, tmp_path: Path) -> None:
    others = [Path(shutil.copytree(model_dir, tmp_path / part / "model")) for part in "ab"]
    inputs = read_inputs([*map(str, others), "gpt2"], text, tmp_path / "page.html")
    assert names(inputs) == [*map(str, others), "gpt2"]
    assert [subject.trained for subject in inputs.subjects] == [None] * 3


@pytest.mark.parametrize(
    ("models", "message"),
    [
        (["{study}/models"], "--model {study}/models: a folder of models, name one of them: {study}/models/ce-seed0, "),
        (["{study}/models/ce-seed0", "{study}"], "--model {study}/models/ce-seed0: named twice"),
        (["{study}/runs"], "--model {study}/runs: no model in it: expected a config.json"),
        ([""], "--model: expected a directory or hub id, got an empty name"),
    ],
)  # fmt: skip
def test_models_that_are_none(
    study: Path, text: Path, tmp_path: Path, models: list[str], message: str
) -> None:
    with pytest.raises(StudyError) as error:
        read_inputs([model.format(study=study) for model in models], text, tmp_path / "page.html")
    assert str(error.value).startswith(message.format(study=study))


def test_a_study_that_kept_no_model(study: Path, text: Path, tmp_path: Path) -> None:
    shutil.rmtree(study / "models")
    with pytest.raises(StudyError, match="without a model of its first seed"):
        read_inputs([str(study)], text, tmp_path / "page.html")


@pytest.mark.parametrize("other", ["tokens", "prefix"])
def test_the_same_tokens_are_needed(other: str, study: Path, text: Path, tmp_path: Path) -> None:
    """Another tokenizer reads the text as other tokens, or has one before them that predicts the first."""
    path = study / "models" / "ce-seed0" / "tokenizer.json"
    if other == "tokens":
        content: dict[str, Any] = json.loads(path.read_text())
        content["model"]["merges"] = []
        path.write_text(json.dumps(content))
    else:
        tokenizer = Tokenizer.from_file(str(path))
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, tokenizer.token_to_id(END_OF_TEXT))]
        )
        tokenizer.save(str(path))
    inputs = read_inputs([str(study)], text, tmp_path / "page.html")
    with pytest.raises(StudyError) as error:
        inspect_models(inputs, [], lambda *_: None)
    first, second = (study / "models" / f"{name}-seed0" for name in LOSSES[:2])
    assert str(error.value) == f"--model {second}: its tokens of the text are not those of {first}"


def test_the_losses_are_those_of_the_models_and_the_modes_of_nvamp(
    study: Path, text: Path, tmp_path: Path
) -> None:
    seen: list[tuple[int, int]] = []
    inspected = inspect_models(
        read_inputs([str(study)], text, tmp_path / "page.html"), [], lambda *now: seen.append(now)
    )
    assert [str(weights.spec) for weights in inspected[0].found.weights] == [
        "nvamp", "ce", "dft", "nvamp:gradient=token", "nvamp:gradient=detached", "nvamp:gradient=full",
    ]  # fmt: skip
    assert [it.trained for it in inspected] == list(LOSSES)
    assert {it.report for it in inspected} == {"study/report.html"}
    assert seen[-1][0] == seen[-1][1]
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_a_link_can_move_with_its_page(tmp_path: Path) -> None:
    target = tmp_path / "a b" / "report#1.html"
    assert link(target, tmp_path / "pages" / "page.html") == "../a%20b/report%231.html"
    assert link(target, Path(os.path.relpath(tmp_path)) / "page.html") == "a%20b/report%231.html"


def test_mistakes_do_not_wait_for_pytorch(study: Path, text: Path, tmp_path: Path) -> None:
    for arguments in (
        ["inspect", "--text", text, "--model", study / "models"],
        ["inspect", "--text", tmp_path / "none", "--model", study],
        ["compare", "--model", study],
    ):
        shown = python(
            "-c",
            f"import sys; sys.argv = ['nvamp', *{[*map(str, arguments)]!r}]\n"
            "from nvamp.cli import main\n"
            "try: main()\n"
            "finally: print({'torch', 'numpy', 'transformers', 'jinja2'} & set(sys.modules))",
        )
        assert (shown.returncode, shown.stdout) == (2, "set()\n")
        assert shown.stderr.startswith("nvamp: --")
        assert shown.stderr.count("\n") == 1
