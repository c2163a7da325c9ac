"""`nvamp inspect`: what it finds, against the model itself. The page: `test_inspect_page.py`."""

import base64
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from nvamp.study import StudyError, inspect
from nvamp.study.inspect import (
    ALTERNATIVES,
    inspect_file,
    inspect_text,
    page_data,
    spell,
    tokenize,
    typed_array,
    windows,
)
from nvamp.study.models import load_model, load_tokenizer
from tests.study.conftest import words

ODD = "a😀b é\r\n\tשלום\x00\x07\u202ex 日本</script>"


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("size", [2, 3, 7, 8, 64])
@pytest.mark.parametrize("tokens", [2, 3, 7, 8, 9, 30, 100])
def test_every_token_is_scored_once_with_half_a_window_before_it(tokens: int, size: int, first: int) -> None:
    spans = list(windows(tokens, size, first))
    assert [t for span in spans for t in range(span.scored, span.end)] == list(range(first, tokens))
    assert {span.end - span.begin for span in spans} == {min(size, tokens)}
    assert spans[0].begin == 0
    assert all(span.scored - span.begin >= size / 2 for span in spans[1:])


def direct(model: Any, context: list[int]) -> torch.Tensor:
    """ln p of every token after `context`."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([context])).logits[0, -1].double().log_softmax(-1)


def starting(tokenizer: Any) -> Any:
    """The tokenizer, but it puts a token before every text."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    end = tokenizer.eos_token
    backend.post_processor = processors.TemplateProcessing(
        f"{end} $A", special_tokens=[(end, tokenizer.eos_token_id)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=end, eos_token=end)


@pytest.mark.parametrize("start", [False, True])
def test_scores_are_those_of_the_model(model_dir: Path, start: bool) -> None:
    model, tokenizer = load_model(str(model_dir)), load_tokenizer(str(model_dir))
    if start:
        tokenizer = starting(tokenizer)
    before = [tokenizer.eos_token_id] if start else []
    seen: list[tuple[int, int]] = []
    found = inspect_text(model, tokenizer, words(5, 60), lambda *now: seen.append(now))
    ids = found.tokens.ids.tolist()
    assert found.window == 16
    assert len(ids) > 40  # several windows
    assert seen[-1] == (len(list(windows(len(ids), 16 - start, 1 - start))),) * 2
    assert len(found.scores.nll) == len(ids) - (not start)
    for span in windows(len(ids), 16 - start, 1 - start):
        for t in range(span.scored, span.end):
            i = t - 1 + start
            log_p = direct(model, before + ids[span.begin : t])
            likeliest = log_p.topk(ALTERNATIVES)
            assert found.scores.nll[i] == pytest.approx(-log_p[ids[t]].item(), rel=1e-5)
            assert found.scores.alternatives[i].tolist() == likeliest.indices.tolist()
            np.testing.assert_allclose(found.scores.alternative_nll[i], -likeliest.values, rtol=1e-5)
    nll = found.scores.nll.astype(np.float64)
    assert float(found.statistics.mean) == pytest.approx(nll.mean())
    assert float(found.statistics.std) == pytest.approx(np.sqrt(nll.var() + 1e-6))
    assert int(found.statistics.max_index) == nll.argmax()


def test_tokens_cover_the_text_to_the_character(tokenizer: Any) -> None:
    tokens = tokenize(tokenizer, ODD)
    assert tokens.text == ODD
    assert tokens.ends[-1] == len(ODD)
    covered = [ODD[a:b] for a, b in zip([0, *tokens.ends], tokens.ends, strict=False)]
    assert "".join(covered) == ODD
    at = covered.index("😀")
    assert covered[at : at + 5] == ["😀", "", "", "", "b"]  # it takes four tokens
    spelled = spell(tokenizer, tokens.ids.tolist())
    assert [spelled[index] for index in tokens.ids[at : at + 4]] == [r"\xf0", r"\x9f", r"\x98", r"\x80"]
    ids = tokenizer.encode("loss mean")
    assert [spell(tokenizer, ids)[index] for index in ids] == ["loss", " mean"]


def test_text_that_no_token_covers_goes_with_the_next_one() -> None:
    backend = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokens = tokenize(PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="?"), "a  b\n")
    assert tokens.ids.tolist() == [0, 1]
    assert tokens.ends.tolist() == [1, 5]


def test_a_leading_space_is_spelled() -> None:
    backend = Tokenizer(models.WordLevel({"▁a": 0, "▁b": 1, "?": 2}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="?")
    assert spell(tokenizer, [1, 9]) == {1: " b", 9: "[9]"}


def test_a_tokenizer_without_offsets_spells_the_text() -> None:
    tokenizer = ByT5Tokenizer()
    assert not tokenizer.is_fast
    tokens = tokenize(tokenizer, "ab cd")
    assert tokens.text == "ab cd"
    assert tokens.ends.tolist() == [1, 2, 3, 4, 5]


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
    dtype = {"Uint8Array": "<u1", "Uint16Array": "<u2", "Uint32Array": "<u4", "Float32Array": "<f4"}[kind]
    back = np.frombuffer(base64.b64decode(found["base64"]), dtype)
    np.testing.assert_array_equal(back, numbers.ravel())


def test_lengths_count_as_javascript_counts(model_dir: Path) -> None:
    found = inspect_text(load_model(str(model_dir)), load_tokenizer(str(model_dir)), ODD)
    lengths = np.frombuffer(base64.b64decode(page_data(found)["lengths"]["base64"]), "<u1")
    assert lengths.sum() == len(ODD.encode("utf-16-le")) // 2 == len(ODD) + 1


def test_the_text_of_a_file_is_kept_to_the_byte(model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(ODD.encode())
    found = inspect_file(str(model_dir), tmp_path / "text", tmp_path / "new" / "page.html", lambda *_: None)
    assert found.tokens.text == ODD
    assert (tmp_path / "new" / "page.html").exists()


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(words(1, 30))
    return path


def error_of(model: Path, text: Path, out: Path) -> str:
    with pytest.raises(StudyError) as error:
        inspect_file(str(model), text, out, lambda *_: None)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_texts_that_are_none(model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "page.html"
    for content, message in (
        (b"", "empty"),
        (b"ab\xff", "not UTF-8, see byte 2"),
        (b"a", "1 tokens, expected at least 2: the first is not predicted"),
    ):
        (tmp_path / "text").write_bytes(content)
        assert error_of(model_dir, tmp_path / "text", out) == f"--text {tmp_path / 'text'}: {message}"
    missing = tmp_path / "missing"
    assert error_of(model_dir, missing, out) == f"--text {missing}: No such file or directory"
    assert error_of(model_dir, tmp_path, out) == f"--text {tmp_path}: Is a directory"
    monkeypatch.setattr(inspect, "MAX_TOKENS", 1)
    (tmp_path / "text").write_text("abc def")
    assert error_of(model_dir, tmp_path / "text", out).endswith("tokens, a page holds 1")
    assert not out.exists()


def test_models_that_are_none(tmp_path: Path, text: Path, model_dir: Path) -> None:
    out = tmp_path / "page.html"
    empty = tmp_path / "empty"
    empty.mkdir()
    assert error_of(empty, text, out).startswith(f"--model {empty}: ")
    for none in (tmp_path / "no" / "such", text, Path("runs/no/such")):
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
    """It is told before the model is looked for, and the text is as it was."""
    model, content = tmp_path / "no" / "model", text.read_bytes()
    assert error_of(model, text, tmp_path) == f"--out {tmp_path}: Is a directory"
    assert error_of(model, text, text / "page.html") == f"--out {text / 'page.html'}: {text} is no directory"
    (tmp_path / "link").symlink_to(text)
    for out in (text, tmp_path / "link", tmp_path / ".." / tmp_path.name / text.name):
        assert error_of(model, text, out) == f"--out {out}: the file of --text, which the page would replace"
    assert text.read_bytes() == content


def test_names_cannot_turn_the_page_around(model_dir: Path, tmp_path: Path) -> None:
    name = "a\u202etxt.<b>"
    (tmp_path / name).write_text(words(1, 30))
    inspect_file(str(model_dir), tmp_path / name, tmp_path / "page.html", lambda *_: None)
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
