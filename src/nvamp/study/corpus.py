"""From documents to token blocks: the split, the tokenizer, and the frequency of each token."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nvamp.study import StudyError

VOCABULARY = 2048  # tokens of the built-in tokenizer
END_OF_TEXT = "<|endoftext|>"
HELD_OUT_SHARE = 0.1
HELD_OUT_TOKENS = 32_768  # no more are evaluated, which keeps evaluation cheap
MIN_DOCUMENTS = 10  # with fewer, each document is split by position
EXCERPT = 12_000  # characters of held-out text to show token by token: a few thousand tokens
CLASSES = ("frequent", "mid", "rare")
# Training tokens sorted by the frequency of their type: the first half is frequent, the last tenth is rare.
CLASS_BOUNDS = (0.5, 0.9)


@dataclass(frozen=True)
class Corpus:
    """Token blocks to train and to evaluate on.

    Attributes:
        tokenizer: a `PreTrainedTokenizerBase`.
        train: [blocks, sequence] int64.
        held_out: [blocks, sequence] int64, from documents (or ends of documents) that are not in `train`.
        source: what the text is, for the report.
        excerpt: the beginning of the longest held-out document; if that is short, of the next ones too.
    """

    tokenizer: Any
    train: Tensor
    held_out: Tensor
    source: str
    excerpt: str

    def fingerprint(self) -> str:
        """A hash of the blocks."""
        digest = hashlib.sha256()
        for blocks in (self.train, self.held_out):
            digest.update(str(tuple(blocks.shape)).encode())
            digest.update(blocks.numpy().tobytes())
        return digest.hexdigest()[:16]


def build_corpus(documents: Sequence[str], source: str, sequence: int, tokenizer: Any = None) -> Corpus:
    """Split `documents`, tokenize them and pack them into blocks of `sequence` tokens.

    Args:
        documents: texts, in an order that is the same in every run.
        tokenizer: a `PreTrainedTokenizerBase`; `None` to train one on the training documents.
    """
    train, held_out = split(documents)
    if tokenizer is None:
        tokenizer = train_tokenizer(train)
    blocks = pack(tokenize(train, tokenizer), sequence)
    held_out_blocks = pack(tokenize(held_out, tokenizer), sequence)
    if not len(blocks) or not len(held_out_blocks):
        raise StudyError(f"the text is too short: not one held-out block of {sequence} tokens in {source}")
    excerpt = "\n\n".join(sorted(held_out, key=len, reverse=True))[:EXCERPT]
    return Corpus(tokenizer, blocks, spread(held_out_blocks, HELD_OUT_TOKENS // sequence), source, excerpt)


def split(documents: Sequence[str]) -> tuple[list[str], list[str]]:
    """Training and held-out documents; a tenth of the characters is held out.

    Whole documents are held out, none of which is longer than that tenth. If there are fewer than
    `MIN_DOCUMENTS`, the end of each one is held out instead.
    """
    if len(documents) < MIN_DOCUMENTS:
        cuts = [len(document) - int(HELD_OUT_SHARE * len(document)) for document in documents]
        return (
            [document[:cut] for document, cut in zip(documents, cuts, strict=True)],
            [document[cut:] for document, cut in zip(documents, cuts, strict=True)],
        )
    wanted = HELD_OUT_SHARE * sum(map(len, documents))
    train: list[str] = []
    held_out: list[str] = []
    taken = 0
    for document in documents:
        if taken < wanted and len(document) <= wanted:
            held_out.append(document)
            taken += len(document)
        else:
            train.append(document)
    return train, held_out


def tokenize(documents: Sequence[str], tokenizer: Any) -> Iterator[list[int]]:
    """The token ids of each document, followed by the end-of-text token if the tokenizer has one."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    # Some tokenizers fail on empty documents; tokenizing all documents at once would double the memory.
    kept = [document for document in documents if document]
    for start in range(0, len(kept), 256):
        for ids in tokenizer(kept[start : start + 256], add_special_tokens=False)["input_ids"]:
            yield ids + end


def pack(documents: Iterable[list[int]], sequence: int) -> Tensor:
    """Join the token ids and cut them into blocks [blocks, sequence] int64; an incomplete one is dropped."""
    ids = np.fromiter(chain.from_iterable(documents), dtype=np.int64)
    blocks = len(ids) // sequence
    return torch.from_numpy(ids[: blocks * sequence].reshape(blocks, sequence))


def spread(blocks: Tensor, limit: int) -> Tensor:
    """At most `limit` of the blocks, evenly spaced."""
    if len(blocks) <= limit:
        return blocks
    return blocks[torch.linspace(0, len(blocks) - 1, max(limit, 1)).round().long()]


def frequency_classes(train: Tensor, vocabulary: int) -> NDArray[np.int64]:
    """The index into `CLASSES` of every token type, [vocabulary] int64.

    Sort the tokens of `train` by the frequency of their type, most frequent first: the place of a type's
    first token, as a share of all tokens, decides its class by `CLASS_BOUNDS`. Types that do not occur are
    rare.
    """
    counts = np.bincount(train.numpy().ravel(), minlength=vocabulary)
    order = np.argsort(-counts, kind="stable")
    before = np.cumsum(counts[order]) - counts[order]
    classes = np.empty(len(counts), dtype=np.int64)
    classes[order] = np.searchsorted(np.array(CLASS_BOUNDS) * counts.sum(), before, side="right")
    return classes


def train_tokenizer(documents: Sequence[str]) -> Any:
    """A byte-level BPE tokenizer of `VOCABULARY` types, a `PreTrainedTokenizerFast`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=END_OF_TEXT, clean_up_tokenization_spaces=False
    )
