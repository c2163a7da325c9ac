"""The page of `nvamp inspect`: its data, and the files around it. In a browser: `test_browser.py`."""

import base64
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from nvamp.study import StudyError
from nvamp.study.inspect import score
from nvamp.study.inspect.inputs import read_inputs
from nvamp.study.inspect.page import (
    STEP,
    Inspected,
    Inspection,
    formula,
    inspect_models,
    page_data,
    sparse_array,
    typed_array,
)
from nvamp.study.inspect.score import inspect_text
from nvamp.study.losses import KNOWN, MODES, parse_losses
from nvamp.study.models import load_model, load_tokenizer
from tests.study.conftest import words
from tests.study.inspect.test_score import ODD


def inspected(model: str | Path, text: Path, out: Path, losses: Sequence[str] = MODES) -> Inspection:
    """What `nvamp inspect` finds with one model."""
    (it,) = inspect_models(read_inputs([str(model)], text, out), losses, lambda *_: None)
    return it.found


TYPES = {"Uint8Array": "<u1", "Uint16Array": "<u2", "Uint32Array": "<u4", "Float32Array": "<f4"}


@pytest.mark.parametrize(
    ("numbers", "kind"),
    [
        (np.array([0, 255]), "Uint8Array"),
        (np.array([0, 256]), "Uint16Array"),
        (np.array([65535]), "Uint16Array"),
        (np.array([[65536, 1]]), "Uint32Array"),
        (np.array([0.1, 3e8], np.float32), "Float32Array"),
    ],
)
def test_typed_arrays(numbers: Any, kind: str) -> None:
    found = typed_array(numbers)
    assert found["type"] == kind
    back = np.frombuffer(base64.b64decode(found["base64"]), TYPES[kind])
    np.testing.assert_array_equal(back, numbers.ravel())


@pytest.mark.parametrize("others", [0, 1, 33, 34, 99])
def test_numbers_of_which_most_are_the_same(others: int) -> None:
    numbers = np.full(99, 0.7, np.float32)
    numbers[:others] = np.arange(others)
    found = sparse_array(numbers)
    if others > 33:
        assert found == {"all": typed_array(numbers)}
        return
    at = np.frombuffer(base64.b64decode(found["at"]["base64"]), "u1")
    back = np.full(99, found["usual"], np.float32)
    back[at] = np.frombuffer(base64.b64decode(found["others"]["base64"]), "<f4")
    np.testing.assert_array_equal(back, numbers)
    assert at.tolist() == list(range(others))


def numbers(array: dict[str, str]) -> NDArray[Any]:
    """Those of a typed array."""
    return np.frombuffer(base64.b64decode(array["base64"]), TYPES[array["type"]])


def test_the_data_of_the_page_are_what_was_found(model_dir: Path) -> None:
    tokenizer, losses = load_tokenizer(str(model_dir)), parse_losses(["ce", "nvamp"])
    models = [load_model(str(model_dir)) for _ in range(2)]
    torch.nn.init.normal_(models[1].lm_head.weight, generator=torch.Generator().manual_seed(0))
    both = [inspect_text(model, tokenizer, words(1, 30), losses) for model in models]
    both[0].scores.alternative_nll[:, -1] = 100.0  # beyond what a page can tell
    data = page_data([Inspected("", found) for found in both])
    tokens = [data["pieces"][index] for index in numbers(data["tokens"])]
    assert "".join(tokens) == words(1, 30)
    for found, shown in zip(both, data["models"], strict=True):
        scores, statistics = found.scores, found.statistics
        np.testing.assert_array_equal(numbers(shown["nll"]), scores.nll)
        pieces = [data["pieces"][index] for index in numbers(shown["alternatives"])]
        assert pieces == [found.pieces[index] for index in scores.alternatives.ravel().tolist()]
        told = np.minimum(scores.alternative_nll.ravel(), STEP * 65_535)
        np.testing.assert_allclose(STEP * numbers(shown["alternativeSteps"]), told, atol=0.501 * STEP)
        z = (scores.nll - float(statistics.mean)) / float(statistics.std)
        np.testing.assert_allclose(numbers(shown["z"]), z, atol=1e-5)
        (term,) = shown["losses"][0]["terms"]
        assert term["weights"]["usual"] == 1  # relative to cross-entropy, which this is


@pytest.mark.parametrize("name", KNOWN)
def test_the_page_has_the_formula_of_the_objective(name: str) -> None:
    shown = formula(parse_losses([name])[0].spec.objective)
    assert "L = " in shown
    for heading in ("Args:", "Raises:", "References:", "Example:"):
        assert heading not in shown


def test_lengths_count_as_javascript_counts(model_dir: Path) -> None:
    found = inspect_text(load_model(str(model_dir)), load_tokenizer(str(model_dir)), ODD, parse_losses(MODES))
    lengths = np.frombuffer(base64.b64decode(page_data([Inspected("", found)])["lengths"]["base64"]), "<u1")
    assert lengths.sum() == len(ODD.encode("utf-16-le")) // 2 == len(ODD) + 1


def test_the_text_of_a_file_is_kept_to_the_byte(model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(ODD.encode())
    found = inspected(model_dir, tmp_path / "text", tmp_path / "new" / "page.html")
    assert found.tokens.text == ODD
    assert (tmp_path / "new" / "page.html").exists()


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(words(1, 30))
    return path


def error_of(model: Path, text: Path, out: Path) -> str:
    with pytest.raises(StudyError) as error:
        inspected(model, text, out)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_texts_that_are_none(model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "page.html"
    for content, message in (
        (b"", "empty"),
        (b"ab\xff", "not UTF-8, see byte 2"),
        (b"a", "expected at least 2 tokens, got 1: the first one is not predicted"),
    ):
        (tmp_path / "text").write_bytes(content)
        assert error_of(model_dir, tmp_path / "text", out) == f"--text {tmp_path / 'text'}: {message}"
    missing = tmp_path / "missing"
    assert error_of(model_dir, missing, out) == f"--text {missing}: No such file or directory"
    assert error_of(model_dir, tmp_path, out) == f"--text {tmp_path}: Is a directory"
    monkeypatch.setattr(score, "MAX_TOKENS", 1)
    (tmp_path / "text").write_text("abc def")
    assert ": expected at most 1 tokens, got " in error_of(model_dir, tmp_path / "text", out)
    assert not out.exists()


def test_losses_that_are_none(model_dir: Path, text: Path, tmp_path: Path) -> None:
    for losses, message in (
        (["bogus"], "--loss bogus: unknown objective 'bogus'"),
        (["ce", "ce"], "--loss ce: named twice"),
        (["token_weighted"], "--loss token_weighted: needs token_weight of every token"),
    ):
        with pytest.raises(StudyError, match=message):
            inspected(model_dir, text, tmp_path / "page.html", losses)
    assert not (tmp_path / "page.html").exists()


def test_models_that_are_none(tmp_path: Path, text: Path, model_dir: Path) -> None:
    out = tmp_path / "page.html"
    empty = tmp_path / "empty"
    empty.mkdir()
    assert error_of(empty, text, out).startswith(f"--model {empty}: ")
    for none in (tmp_path / "no" / "such", Path("runs/no/such")):
        assert error_of(none, text, out) == f"--model {none}: no such directory"
    small = tmp_path / "small"
    shutil.copytree(model_dir, small)
    config = json.loads((small / "config.json").read_text())
    model = load_model(str(model_dir))
    model.resize_token_embeddings(20)
    model.save_pretrained(small)
    assert config["vocab_size"] > 20
    assert "the tokenizer gives token" in error_of(small, text, out)
    model = load_model(str(model_dir))
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    model.save_pretrained(small)
    assert error_of(small, text, out) == f"--text {text}: the model gives losses that are not finite"
    assert not out.exists()


def test_an_output_that_cannot_be(text: Path, tmp_path: Path) -> None:
    """It is reported before the model is looked for, and the text is as it was."""
    model, content = tmp_path / "no" / "model", text.read_bytes()
    assert error_of(model, text, tmp_path) == f"--out {tmp_path}: Is a directory"
    assert (
        error_of(model, text, text / "page.html") == f"--out {text / 'page.html'}: {text} is not a directory"
    )
    (tmp_path / "link").symlink_to(text)
    for out in (text, tmp_path / "link", tmp_path / ".." / tmp_path.name / text.name):
        assert error_of(model, text, out) == f"--out {out}: the file of --text, which the page would replace"
    assert text.read_bytes() == content


def test_names_cannot_turn_the_page_around(model_dir: Path, tmp_path: Path) -> None:
    name = "a\u202etxt.<b>"
    (tmp_path / name).write_text(words(1, 30))
    inspected(model_dir, tmp_path / name, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "\u202e" not in page
    assert "<h1>a⟨U+202E⟩txt.&lt;b&gt; " in page
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".part"] == []


def test_a_name_that_could_be_a_hubs_or_a_directorys(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = error_of(Path("runs/model"), text, tmp_path / "page.html")
    assert message.startswith("--model runs/model: ")
    assert message.endswith(" (no such directory here either)")


def test_a_hub_out_of_reach_is_asked_once(
    text: Path, tmp_path: Path, lookups: list[Any], capfd: pytest.CaptureFixture[str]
) -> None:
    message = error_of(Path("runs/model"), text, tmp_path / "page.html")
    assert message.endswith(" (no such directory here either)")
    assert len(lookups) == 1
    assert capfd.readouterr() == ("", "")


def test_a_file_is_no_model(model_dir: Path, text: Path, tmp_path: Path) -> None:
    file = model_dir / "config.json"
    message = error_of(file, text, tmp_path / "page.html")
    assert message == f"--model {file}: a file, expected the directory of a model"


@pytest.mark.parametrize("kind", ["config.json", "tokenizer_config.json"])
def test_code_that_comes_with_a_model_is_not_run(
    model_dir: Path, text: Path, tmp_path: Path, kind: str
) -> None:
    model = tmp_path / "model"
    shutil.copytree(model_dir, model)
    (model / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    config = json.loads((model / kind).read_text())
    if kind == "config.json":
        config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}}
    else:
        del config["tokenizer_class"]
        config["auto_map"] = {"AutoTokenizer": [None, "evil.Evil"]}
    (model / kind).write_text(json.dumps(config))
    assert "custom code" in error_of(model, text, tmp_path / "page.html")
    assert not (tmp_path / "ran").exists()
