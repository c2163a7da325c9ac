"""From documents to token blocks: the split, the tokenizer, and the frequency of each token."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nvamp.study import StudyError
from nvamp.study.chats import end_of, prefix_of
from nvamp.study.packing import IGNORED, Blocks, pack_text

VOCABULARY = 2048  # tokens of the built-in tokenizer
END_OF_TEXT = "<|endoftext|>"
HELD_OUT_SHARE = 0.1
HELD_OUT_TOKENS = 32_768  # no more are evaluated, which keeps evaluation cheap
MIN_DOCUMENTS = 10  # with fewer, each document is split by position
EXCERPT = 12_000  # characters of held-out text to show token by token: a few thousand tokens
CLASSES = ("frequent", "mid", "rare")
# Training tokens sorted by the frequency of their type: the first half is frequent, the last tenth is rare.
CLASS_BOUNDS = (0.5, 0.9)


class Prompt(NamedTuple):
    """A held-out prompt.

    Attributes:
        ids: its tokens, at least one.
        answer: the answer of its example as text.
        end: the special token that ends the answer; `None` if there is none.
    """

    ids: list[int]
    answer: str
    end: int | None = None


@dataclass(frozen=True)
class Corpus:
    """Token blocks to train and to evaluate on.

    Attributes:
        tokenizer: a `PreTrainedTokenizerBase`.
        training: the blocks to train on.
        evaluation: blocks of documents (or ends of documents), or of examples, that are not in `training`.
        source: what the text is, for the report.
        excerpt: the beginning of the longest held-out document or example; if that is short, of the next
            ones too.
        prompts: of the held-out examples that are whole and have one; empty for text.
        counts: what became of the rows of a dataset, in numbers.
        also: blocks of another text to evaluate on, before and after training; `None` for none.
        special_tokens: whether special tokens that the excerpt spells out are such, or else text.
    """

    tokenizer: Any
    training: Blocks
    evaluation: Blocks
    source: str
    excerpt: str
    prompts: tuple[Prompt, ...] = ()
    counts: Mapping[str, Any] = field(default_factory=dict)
    also: Blocks | None = None
    special_tokens: bool = False

    @property
    def train(self) -> Tensor:
        """The tokens of `training`, [blocks, sequence] int64."""
        return self.training.inputs

    @property
    def held_out(self) -> Tensor:
        """The tokens of `evaluation`, [blocks, sequence] int64."""
        return self.evaluation.inputs

    def fingerprint(self) -> str:
        """A hash of the blocks and the prompts."""
        digest = hashlib.sha256()
        for prompt in self.prompts:
            digest.update(repr(tuple(prompt)).encode())
        for blocks in filter(None, (self.training, self.evaluation, self.also)):
            digest.update(str(tuple(blocks.inputs.shape)).encode())
            digest.update(blocks.inputs.numpy().tobytes())
            if not torch.equal(blocks.labels, blocks.inputs):
                digest.update(blocks.labels.numpy().tobytes())
            if blocks.positions is not None:
                digest.update(blocks.positions.numpy().tobytes())
        return digest.hexdigest()[:16]


def build_corpus(
    documents: Sequence[str], source: str, sequence: int, tokenizer: Any = None, special: bool = False
) -> Corpus:
    """Split `documents`, tokenize them and pack them into blocks of `sequence` tokens.

    Args:
        documents: texts, in an order that is the same in every run.
        tokenizer: a `PreTrainedTokenizerBase`; `None` to train one on the training documents.
        special: whether special tokens that a text spells out are such, or else text.
    """
    train, held_out = split(documents)
    if tokenizer is None:
        tokenizer = train_tokenizer(train)
    prefix = prefix_of(tokenizer)
    training = pack_text(tokenize(train, tokenizer, special), sequence, prefix)
    evaluation = pack_text(tokenize(held_out, tokenizer, special), sequence, prefix)
    if not len(evaluation):
        raise StudyError(f"the text is too short: not one held-out block of {sequence} tokens in {source}")
    return Corpus(
        tokenizer,
        training,
        evaluation.spread(HELD_OUT_TOKENS // sequence),
        source,
        excerpt_of(held_out),
        special_tokens=special,
    )


def excerpt_of(held_out: Sequence[str]) -> str:
    """The beginning of the longest text; if that is short, of the next ones too."""
    return "\n\n".join(sorted(held_out, key=len, reverse=True))[:EXCERPT]


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


def tokenize(documents: Sequence[str], tokenizer: Any, special: bool = False) -> Iterator[list[int]]:
    """The token ids of each document, followed by the end-of-text token if the tokenizer has one.

    Args:
        special: whether special tokens that a text spells out are such, or else text.
    """
    end = end_of(tokenizer)
    # Some tokenizers fail on empty documents; tokenizing all documents at once would double the memory.
    kept = [document for document in documents if document]
    for start in range(0, len(kept), 256):
        found = tokenizer(
            kept[start : start + 256], add_special_tokens=False, split_special_tokens=not special
        )
        for ids in found["input_ids"]:
            yield ids + end


def frequency_classes(train: Tensor, vocabulary: int) -> NDArray[np.int64]:
    """The index into `CLASSES` of every token type, [vocabulary] int64.

    Sort the tokens of `train` by the frequency of their type, most frequent first: the place of a type's
    first token, as a share of all tokens, decides its class by `CLASS_BOUNDS`. Types that do not occur are
    rare. Labels of -100 are no tokens.
    """
    tokens = train.numpy().ravel()
    counts = np.bincount(tokens[tokens != IGNORED], minlength=vocabulary)
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
