"""Scores of a text under a model: the losses and the weight of each token, and the likeliest in its place."""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers.convert_slow_tokenizer import bytes_to_unicode

from nvamp.functional import token_nll
from nvamp.integrations.transformers import logits_of
from nvamp.objectives import Batch, Statistics
from nvamp.objectives.spec import LossSpec
from nvamp.objectives.statistics import statistics as statistics_of
from nvamp.study import StudyError
from nvamp.study.chats import prefix_of
from nvamp.study.inspect.weights import Weights, weigh
from nvamp.study.losses import Loss
from nvamp.study.models import check_tokens, positions

WINDOW = 1024  # most positions in a window, if the model takes more or does not say
ALTERNATIVES = 5  # how many of the likeliest tokens are kept at each position
MAX_TOKENS = 1_000_000  # a page of so many takes tens of megabytes
LOGITS = 2**23  # most logits in one batch of windows, which has at least one window

_BYTES = {character: byte for byte, character in bytes_to_unicode().items()}

# (windows done, windows there are)
Progress = Callable[[int, int], None]


class Tokens(NamedTuple):
    """A text and its tokens.

    Attributes:
        text: the text that the tokens cover.
        ids: [tokens] int64.
        ends: [tokens] int64, the character of the text at which each token ends; it begins where the
            previous one ends. If tokens share a character, the first one covers it and the others are empty.
    """

    text: str
    ids: NDArray[np.int64]
    ends: NDArray[np.int64]


class Scores(NamedTuple):
    """A model's predictions of the tokens of a text: of all of them, or all but the first.

    Attributes:
        nll: [scored] float32, the plain losses of the tokens in nats.
        alternatives: [scored, ALTERNATIVES] int64, the likeliest tokens in their place, likeliest first.
        alternative_nll: [scored, ALTERNATIVES] float32, the losses of these in nats.
        ell: [scored, losses] float32, the losses of the tokens with the token options of each loss, in nats.
        entropy: [scored, losses] float32, the entropies of the predictions in nats; 0 if the loss needs none.
    """

    nll: NDArray[np.float32]
    alternatives: NDArray[np.int64]
    alternative_nll: NDArray[np.float32]
    ell: NDArray[np.float32]
    entropy: NDArray[np.float32]


class Inspection(NamedTuple):
    """A text and its scores under a model.

    Attributes:
        pieces: the text of each token type that is among the tokens or the alternatives.
        window: the positions that the model sees at once.
        statistics: the statistics of all scored tokens as one batch, float64.
        weights: what each loss makes of that batch.
    """

    tokens: Tokens
    scores: Scores
    pieces: dict[int, str]
    window: int
    statistics: Statistics
    weights: list[Weights]


def inspect_text(
    model: Any,
    tokenizer: Any,
    text: str,
    losses: Sequence[Loss],
    progress: Progress = lambda done, of: None,
    special_tokens: bool = False,
) -> Inspection:
    """Score every token of `text` on the device of `model`, and weigh it under each of the losses.

    Args:
        special_tokens: whether special tokens that the text spells out are such, or else text.

    Raises:
        StudyError: the text has too few or too many tokens, the tokenizer belongs to another model, or a loss
            is not finite.
    """
    tokens = tokenize(tokenizer, text, special_tokens)
    start = prefix_of(tokenizer)
    scored = len(tokens.ids) - (not start)
    if scored < 1:
        raise StudyError(f"expected at least 2 tokens, got {len(tokens.ids)}: the first one is not predicted")
    if scored > MAX_TOKENS:
        raise StudyError(f"expected at most {MAX_TOKENS:,} tokens, got {len(tokens.ids):,}")
    check_tokens(model.config, max([*start, int(tokens.ids.max())]))
    window = min(positions(model.config) or WINDOW, WINDOW)
    if len(start) >= window:
        raise StudyError(
            f"the tokenizer's own {len(start)} tokens before the text fill the model's {window} positions"
        )
    specs = [loss.spec for loss in losses]
    scores = score(model, start, tokens.ids, window, specs, progress)
    if not (np.isfinite(scores.nll).all() and np.isfinite(scores.ell).all()):
        raise StudyError("the model gives losses that are not finite")
    used = np.unique(np.concatenate((tokens.ids, scores.alternatives.ravel())))
    nll = torch.from_numpy(scores.nll).double()
    statistics = statistics_of(Batch(nll, torch.ones_like(nll, dtype=torch.bool)))
    weights = [
        weigh(spec, scores.ell[:, index], scores.entropy[:, index]) for index, spec in enumerate(specs)
    ]
    return Inspection(tokens, scores, spell(tokenizer, used.tolist()), window, statistics, weights)


def tokenize(tokenizer: Any, text: str, special_tokens: bool = False) -> Tokens:
    """The tokens of `text`, without the special tokens that a tokenizer puts around it.

    Special tokens that the text spells out are text too, unless `special_tokens`.

    A slow tokenizer does not report where its tokens are: the text is then what its tokens spell.
    """
    options = {"add_special_tokens": False, "split_special_tokens": not special_tokens}
    if tokenizer.is_fast:
        found = tokenizer(text, return_offsets_mapping=True, **options)
        ids, ends = found["input_ids"], [end for _, end in found["offset_mapping"]]
        ends[-1:] = [len(text)] if ends else []  # the last token takes what is left over
    else:
        ids = tokenizer(text, **options)["input_ids"]
        spelled = spell(tokenizer, ids)
        text = "".join(spelled[index] for index in ids)
        ends = list(accumulate(len(spelled[index]) for index in ids))
    return Tokens(text, np.array(ids, np.int64), np.array(ends, np.int64))


def spell(tokenizer: Any, ids: Iterable[int]) -> dict[int, str]:
    """The text of each token as it follows other text; a part of a character as its bytes, such as \\xf0."""
    before = tokenizer.encode("a", add_special_tokens=False)  # on its own, a token may lose its leading space
    cut = len(tokenizer.decode(before))
    spelled: dict[int, str] = {}
    for index in ids:
        if index not in spelled:
            text = tokenizer.decode([*before, index], clean_up_tokenization_spaces=False)[cut:]
            spelled[index] = text if text and "\ufffd" not in text else _raw(tokenizer, index)
    return spelled


def _raw(tokenizer: Any, index: int) -> str:
    piece = tokenizer.convert_ids_to_tokens(index)
    if piece is None:  # the model's vocabulary is padded beyond the tokenizer's
        return f"[{index}]"
    if byte := re.fullmatch("<0x([0-9A-F]{2})>", piece):  # as tokenizers made by SentencePiece write it
        return rf"\x{byte[1].lower()}"
    if all(character in _BYTES for character in piece):
        return "".join(f"\\x{_BYTES[character]:02x}" for character in piece)
    return str(piece)


class Window(NamedTuple):
    """The tokens [begin, end) that a model sees at once; it scores those from `scored` on."""

    begin: int
    scored: int
    end: int


def windows(tokens: int, size: int, first: int) -> Iterator[Window]:
    """Windows that each advance by half their size, and score the tokens that are new.

    Every token outside the first window is thus scored with at least half a window before it. All windows
    have the same length: the last one begins earlier instead of being shorter.

    Args:
        tokens: the number of tokens.
        size: the number of tokens in a window.
        first: the first token to score.
    """
    end, scored = min(size, tokens), first
    while True:
        yield Window(max(end - size, 0), scored, end)
        if end == tokens:
            return
        end, scored = min(end + max(size // 2, 1), tokens), end


@torch.no_grad()
def score(
    model: Any,
    start: list[int],
    ids: NDArray[np.int64],
    size: int,
    losses: Sequence[LossSpec],
    progress: Progress,
) -> Scores:
    """Score the tokens `ids`.

    Args:
        start: the tokens that every window begins with; if there are none, the first of `ids` is not scored.
        ids: [tokens].
        size: the number of tokens in a window, `start` included.
    """
    model.eval()
    device = next(model.parameters()).device
    text, before = torch.from_numpy(ids), torch.tensor(start, dtype=torch.int64)
    spans = list(windows(len(text), size - len(start), 0 if start else 1))
    length = len(start) + spans[0].end
    batch = max(1, LOGITS // (length * model.config.get_text_config().vocab_size))
    parts: list[tuple[Tensor, ...]] = []
    for done in range(0, len(spans), batch):
        some = spans[done : done + batch]
        inputs = torch.stack([torch.cat((before, text[span.begin : span.end])) for span in some])
        logits = logits_of(model(input_ids=inputs.to(device), use_cache=False))
        # The logits at a position predict the token after it.
        predicted = [
            row[len(start) + span.scored - span.begin - 1 : -1]
            for row, span in zip(logits, some, strict=True)
        ]
        labels = torch.cat([text[span.scored : span.end] for span in some]).to(device)
        parts.append(_scores_of(torch.cat(predicted).float(), labels, losses))
        progress(min(done + batch, len(spans)), len(spans))
    return Scores(*(torch.cat(part).numpy() for part in zip(*parts, strict=True)))


def _scores_of(logits: Tensor, labels: Tensor, losses: Sequence[LossSpec]) -> tuple[Tensor, ...]:
    """The fields of `Scores`, on the CPU, from logits [tokens, vocabulary] float32 and labels [tokens]."""
    log_p = logits.log_softmax(-1)
    top = log_p.topk(min(ALTERNATIVES, logits.shape[-1]))
    nll = -log_p.gather(-1, labels[:, None])[:, 0]
    ell = [nll] * len(losses)
    entropy = [torch.zeros_like(nll)] * len(losses)
    for index, (objective, options) in enumerate(losses):
        if options or objective.needs_entropy:
            ell[index], metrics = token_nll(logits, labels, return_metrics=True, **options)
            entropy[index] = metrics.entropy
    fields = nll, top.indices, -top.values, torch.stack(ell, -1), torch.stack(entropy, -1)
    return tuple(field.cpu() for field in fields)
