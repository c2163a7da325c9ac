"""Blocks of tokens: texts that run on, or whole examples that do not see each other."""

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nvamp.study import StudyError
from nvamp.study.chats import Encoded

IGNORED = -100  # the label of a token that is not learned


@dataclass(frozen=True)
class Blocks:
    """Blocks of tokens, each field [blocks, sequence] int64.

    Attributes:
        inputs: the tokens.
        labels: the tokens again, or `IGNORED` for those that are not learned. The first token of a block is
            not predicted, whatever its label.
        positions: the place of each token in its example, from 0 on: a model that is given these and no
            attention mask keeps the examples of a block apart. `None` if a block is one example, or text.
        examples: the index of each token's example, -1 for padding; `None` for text.
    """

    inputs: Tensor
    labels: Tensor
    positions: Tensor | None = None
    examples: Tensor | None = None

    def __len__(self) -> int:
        return len(self.inputs)

    @property
    def tokens(self) -> int:
        """How many tokens there are, padding aside."""
        return self.inputs.numel() if self.examples is None else int((self.examples >= 0).sum())

    def __getitem__(self, index: int | slice) -> dict[str, Tensor]:
        """What a model takes, of one block or of several."""
        item = {"input_ids": self.inputs[index], "labels": self.labels[index]}
        return item if self.positions is None else {**item, "position_ids": self.positions[index]}

    @property
    def learned(self) -> Tensor:
        """The labels of all tokens that are predicted and learned, [tokens] int64, block by block."""
        labels = self.labels[:, 1:].reshape(-1)
        return labels[labels != IGNORED]

    @property
    def owners(self) -> NDArray[np.int64]:
        """The example of each token that is predicted and learned, [tokens]; of text, its block."""
        owners = self.examples if self.examples is not None else torch.arange(len(self))[:, None]
        found: NDArray[np.int64] = owners.expand_as(self.labels)[:, 1:][self.labels[:, 1:] != IGNORED].numpy()
        return found

    def spread(self, limit: int) -> "Blocks":
        """At most `limit` of the blocks, evenly spaced."""
        return replace(
            self, **{name: spread(field, limit) for name, field in vars(self).items() if field is not None}
        )


def plain(inputs: Tensor) -> Blocks:
    """Blocks of text [blocks, sequence] int64, all of which is learned."""
    return Blocks(inputs, inputs)


def noisy(blocks: Blocks, vocabulary: int, noise: float | Tensor, seed: int) -> Blocks:
    """The blocks with random tokens, uniform over the vocabulary, in place of some of the labels.

    Args:
        noise: the probability that a label is replaced: one number, or a tensor [blocks, sequence]. Labels
            that are not learned stay.
    """
    shape = blocks.inputs.shape
    generator = torch.Generator().manual_seed(seed)
    replaced = torch.rand(shape, generator=generator) < noise
    tokens = torch.randint(vocabulary, shape, generator=generator)
    return replace(blocks, labels=torch.where(replaced & (blocks.labels != IGNORED), tokens, blocks.labels))


def spread(blocks: Tensor, limit: int) -> Tensor:
    """At most `limit` of the blocks, evenly spaced."""
    if len(blocks) <= limit:
        return blocks
    return blocks[torch.linspace(0, len(blocks) - 1, max(limit, 1)).round().long()]


def pack(documents: Iterable[list[int]], sequence: int) -> Tensor:
    """Join the token ids and cut them into blocks [blocks, sequence] int64; an incomplete one is dropped."""
    ids = np.fromiter(chain.from_iterable(documents), dtype=np.int64)
    blocks = len(ids) // sequence
    return torch.from_numpy(ids[: blocks * sequence].reshape(blocks, sequence))


def pack_text(documents: Iterable[list[int]], sequence: int, prefix: list[int]) -> Blocks:
    """Join the documents and cut them into blocks; the prefix begins each document and each block.

    The prefix is not learned. An incomplete block is dropped.

    Args:
        sequence: the length of a block: the prefix, and at least a token to see and one to predict.
    """
    if sequence < len(prefix) + 2:
        raise StudyError(f"expected blocks of at least {len(prefix) + 2} tokens, got {sequence}")
    if not prefix:
        return plain(pack(documents, sequence))
    ids, places = [], []  # a place: how many tokens of the prefix precede a token in its document
    for document in documents:
        ids += [*prefix, *document]
        places += [*range(len(prefix)), *(len(prefix) for _ in document)]
    stream, place = np.array(ids, np.int64), np.array(places, np.int64)
    begin, blocks, learned = 0, [], []
    while begin < len(stream):
        before = prefix[: place[begin]]
        end = begin + sequence - len(before)
        if end > len(stream):
            break
        blocks.append([*before, *stream[begin:end]])
        learned.append([*(False for _ in before), *(place[begin:end] == len(prefix))])
        begin = end
    inputs = torch.tensor(blocks, dtype=torch.int64).view(-1, sequence)
    return Blocks(inputs, inputs.where(torch.tensor(learned, dtype=torch.bool).view(-1, sequence), IGNORED))


def pack_examples(examples: Sequence[Encoded], sequence: int, padding: int, together: bool) -> Blocks:
    """Put whole examples into blocks, and fill these up with padding.

    Args:
        examples: none of them longer than `sequence`.
        padding: the token to fill up with; it is not learned.
        together: whether a block may hold several; each joins the fullest block that has room for it.
    """
    rows = (
        _fit([len(example.ids) for example in examples], sequence)
        if together
        else [[index] for index in range(len(examples))]
    )
    shape = len(rows), sequence
    inputs, labels = np.full(shape, padding, np.int64), np.full(shape, IGNORED, np.int64)
    positions, numbers = np.tile(np.arange(sequence), (len(rows), 1)), np.full(shape, -1, np.int64)
    for row, members in enumerate(rows):
        at = 0
        for index in members:
            ids, learned = np.array(examples[index].ids, np.int64), np.array(examples[index].learned, bool)
            learned[0] = False  # no token of the example precedes it
            own = slice(at, at + len(ids))
            inputs[row, own] = ids
            labels[row, own] = np.where(learned, ids, IGNORED)
            numbers[row, own] = index
            positions[row, at:] = np.arange(sequence - at)
            at += len(ids)
        positions[row, at:] = np.arange(sequence - at)  # the padding's own
    fields: list[NDArray[np.int64]] = [inputs, labels, positions, numbers]
    found = Blocks(*map(torch.from_numpy, fields))
    return found if together else replace(found, positions=None)


def _fit(lengths: Sequence[int], size: int) -> list[list[int]]:
    """The indices of the lengths in rows of a size; each joins the fullest row that has room for it."""
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (room, row), least room first
    for index, length in enumerate(lengths):
        place = bisect_left(free, (length, 0))
        if place == len(free):
            rows.append([])
            room, row = size, len(rows) - 1
        else:
            room, row = free.pop(place)
        rows[row].append(index)
        insort(free, (room - length, row))
    return rows
