"""What `nvamp inspect` finds, against the model itself."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from nvamp.functional import token_weights
from nvamp.objectives import NVAMP, Batch, EntropyWeighted
from nvamp.study import StudyError
from nvamp.study.inspect import score
from nvamp.study.inspect.score import ALTERNATIVES, inspect_text, spell, tokenize, windows
from nvamp.study.inspect.weights import weigh
from nvamp.study.losses import KNOWN, parse_losses
from nvamp.study.models import load_model, load_tokenizer
from tests.study.conftest import dropping, words

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


def test_a_window_of_one_token_moves_on() -> None:
    assert list(windows(3, 1, 0)) == [(0, 0, 1), (1, 1, 2), (2, 2, 3)]


def direct(model: Any, context: list[int]) -> torch.Tensor:
    """ln p of every token after `context`."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([context])).logits[0, -1].double().log_softmax(-1)


def starting(tokenizer: Any, start: int) -> Any:
    """The tokenizer, but it puts so many tokens before every text, and one after it."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    end = tokenizer.eos_token
    backend.post_processor = processors.TemplateProcessing(
        f"{f'{end} ' * start}$A {end}", special_tokens=[(end, tokenizer.eos_token_id)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=end)


LOSSES = ("ce", "nvamp:gamma=0.3,gradient=token,label_smoothing=0.1", "entropy:kind=mile")


@pytest.mark.parametrize("start", [0, 1, 3])
def test_scores_are_those_of_the_model(model_dir: Path, start: int) -> None:
    model, tokenizer = load_model(str(model_dir)), starting(load_tokenizer(str(model_dir)), start)
    before = [tokenizer.eos_token_id] * start
    skipped = 0 if start else 1  # the first token, which nothing predicts
    seen: list[tuple[int, int]] = []
    found = inspect_text(model, tokenizer, words(5, 60), parse_losses(LOSSES), lambda *now: seen.append(now))
    ids = found.tokens.ids.tolist()
    assert found.window == 16
    assert len(ids) > 40  # several windows
    assert seen[-1] == (len(list(windows(len(ids), 16 - start, skipped))),) * 2
    assert len(found.scores.nll) == len(ids) - skipped
    for span in windows(len(ids), 16 - start, skipped):
        for t in range(span.scored, span.end):
            i = t - skipped
            log_p = direct(model, before + ids[span.begin : t])
            likeliest = log_p.topk(ALTERNATIVES)
            assert found.scores.nll[i] == pytest.approx(-log_p[ids[t]].item(), rel=1e-5)
            assert found.scores.alternatives[i].tolist() == likeliest.indices.tolist()
            np.testing.assert_allclose(found.scores.alternative_nll[i], -likeliest.values, rtol=1e-5)
            smoothed = -0.9 * log_p[ids[t]] - 0.1 * log_p.mean()
            entropy = -(log_p.exp() * log_p).sum()
            np.testing.assert_allclose(
                found.scores.ell[i], [-log_p[ids[t]], smoothed, -log_p[ids[t]]], rtol=1e-5
            )
            np.testing.assert_allclose(found.scores.entropy[i, 2], entropy, rtol=1e-5)
    nll = found.scores.nll.astype(np.float64)
    assert float(found.statistics.mean) == pytest.approx(nll.mean())
    assert float(found.statistics.std) == pytest.approx(np.sqrt(nll.var() + 1e-6))
    assert int(found.statistics.max_index) == nll.argmax()
    plain, smoothed, weighted = found.weights
    ell, entropy = (torch.from_numpy(x).double() for x in (found.scores.ell, found.scores.entropy))
    of_smoothed = token_weights(NVAMP(gamma=0.3, gradient="token"), ell[:, 1])
    terms = {term.name: term for term in smoothed.terms}
    assert {name: term.coefficient for name, term in terms.items()} == {
        "alpha": 1,
        "beta": 0.02,
        "gamma": 0.3,
    }
    mixed = sum(term.coefficient * term.weights for term in smoothed.terms)
    np.testing.assert_allclose(mixed, of_smoothed, rtol=1e-12)
    (term,) = weighted.terms
    assert (term.name, term.coefficient) == (None, 1)
    expected = token_weights(EntropyWeighted("mile"), ell[:, 2], entropy=entropy[:, 2])
    np.testing.assert_array_equal(term.weights, expected)
    np.testing.assert_allclose(plain.terms[0].weights, 1 / len(nll))


@pytest.mark.parametrize(
    "text",
    [
        *KNOWN,
        "nvamp:gradient=token,tail=0.1",
        "nvamp:gradient=full",
        "nvamp:alpha=0",
        "nvamp:gradient=detached",
    ],
)
def test_the_terms_add_up_to_the_loss(text: str) -> None:
    (loss,) = parse_losses([text])
    generator = np.random.default_rng(0)
    ell, entropy = generator.gamma(2, 2, (2, 200)).astype(np.float32)
    found = weigh(loss.spec, ell, entropy)
    nll, given = torch.from_numpy(ell).double(), torch.from_numpy(entropy).double()
    result = loss.spec.objective.evaluate(Batch(nll, torch.ones(200, dtype=torch.bool), entropy=given))
    assert sum(term.coefficient * term.value for term in found.terms) == pytest.approx(
        float(result.loss), rel=1e-12
    )
    mixed = sum(term.coefficient * term.weights for term in found.terms)
    expected = token_weights(
        loss.spec.objective, nll, entropy=given if loss.spec.objective.needs_entropy else None
    )
    np.testing.assert_allclose(mixed, expected, rtol=1e-12, atol=1e-18)


def test_a_prefix_that_leaves_no_room(model_dir: Path) -> None:
    model, tokenizer = load_model(str(model_dir)), starting(load_tokenizer(str(model_dir)), 16)
    with pytest.raises(StudyError, match="own 16 tokens before the text fill the model's 16 positions"):
        inspect_text(model, tokenizer, "alpha beta", parse_losses(["ce"]))


def test_a_window_has_a_most_and_a_batch_a_least(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the model takes, and however many logits a window has."""
    model, tokenizer = load_model(str(model_dir)), load_tokenizer(str(model_dir))
    expected = inspect_text(model, tokenizer, words(5, 60), parse_losses(["ce"]))
    monkeypatch.setattr(score, "LOGITS", 1)
    found = inspect_text(model, tokenizer, words(5, 60), parse_losses(["ce"]))
    np.testing.assert_allclose(found.scores.nll, expected.scores.nll, rtol=1e-5)
    monkeypatch.setattr(score, "WINDOW", 8)
    assert inspect_text(model, tokenizer, words(5, 60), parse_losses(["ce"])).window == 8


def test_dropout_does_not_touch_scores(tokenizer: Any) -> None:
    model = dropping(len(tokenizer))
    first, again = (
        inspect_text(which(), tokenizer, words(5, 60), parse_losses(["ce"])).scores.nll
        for which in (lambda: model, model.eval)
    )
    np.testing.assert_array_equal(first, again)


def test_parts_of_a_character_are_spelled_as_bytes() -> None:
    """A tokenizer with byte fallback, as SentencePiece makes them."""
    pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    backend = Tokenizer(
        models.BPE({piece: i for i, piece in enumerate([*pieces, "a"])}, [], byte_fallback=True)
    )
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    tokens = tokenize(tokenizer, "aé")
    assert tokens.ids.tolist() == [256, 0xC3, 0xA9]
    assert spell(tokenizer, [256, 0xC3, 0xA9, 0x0A]) == {256: "a", 0xC3: r"\xc3", 0xA9: r"\xa9", 0x0A: "\n"}


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


def test_special_tokens_that_a_text_spells_out_are_text(tokenizer: Any) -> None:
    text = f"loss{tokenizer.eos_token}mean"
    found = [tokenize(tokenizer, text, special).ids.tolist() for special in (False, True)]
    assert [tokenizer.eos_token_id in ids for ids in found] == [False, True]
    assert [tokenizer.decode(ids) for ids in found] == [text, text]
    assert tokenize(ByT5Tokenizer(), "a</s>").ids.tolist() == [3 + byte for byte in b"a</s>"]


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


def test_a_space_before_punctuation_is_spelled() -> None:
    backend = Tokenizer(models.WordLevel({"▁a": 0, "▁.": 1, "?": 2}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="?", clean_up_tokenization_spaces=True
    )
    assert tokenizer.decode([0, 1]) == "a."
    assert spell(tokenizer, [1]) == {1: " ."}


def test_a_tokenizer_without_offsets_spells_the_text() -> None:
    tokenizer = ByT5Tokenizer()
    assert not tokenizer.is_fast
    tokens = tokenize(tokenizer, "ab cd")
    assert tokens.text == "ab cd"
    assert tokens.ends.tolist() == [1, 2, 3, 4, 5]
