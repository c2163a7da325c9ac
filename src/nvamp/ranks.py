"""The ranks that share a batch or a vocabulary, seen from one of them.

Nothing here needs `torch.distributed`: `nvamp.distributed` makes `Ranks` from a process group.
"""

import zlib
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad


class Ranks(NamedTuple):
    """A set of ranks. By default there is one, and it has everything."""

    rank: int = 0
    size: int = 1
    gather: Callable[[Tensor], Tensor] = lambda x: x[None]  # [k] of every rank -> [size, k]
    total: Callable[[Tensor], Tensor] = lambda x: x  # the sum of x over the ranks
    maximum: Callable[[Tensor], Tensor] = lambda x: x  # the elementwise maximum of x over the ranks


ALONE = Ranks()

TERMS, ROOM = 6, 32  # numbers of 4 bytes at the head of the first exchange, and behind it
UNKNOWN = -1  # the term of a rank that cannot say

Term = str | int  # a text, or a number from 0 on


class Exchange:
    """The exchanges of one call of a loss, which the ranks must make in step.

    The first has the same form in every call, one row of words for each rank: at the head what this rank
    calls, then what it gives. So a rank sees the others' terms even if what they give has another dtype or
    another size. Terms that differ are an error on every rank. It is raised where looking costs nothing, on a
    CPU, and the first time `terms` are used; elsewhere the exchange gives NaN.
    """

    def __init__(self, ranks: Ranks, terms: Mapping[str, Term], first: bool = False) -> None:
        self.terms = dict(terms)
        self.made = 0  # exchanges so far
        self.skip = 0  # exchanges to leave out, because they are made
        self.in_step = True
        self._others, self._first, self._failed = ranks, first, False

    @property
    def ranks(self) -> Ranks:
        return Ranks(
            self._others.rank,
            self._others.size,
            lambda x: self._make(x, self._others.gather, lambda rows: rows),
            lambda x: self._make(x, self._others.total, lambda rows: rows.sum(0, dtype=x.dtype)),
            lambda x: self._make(x, self._others.maximum, lambda rows: rows.amax(0)),
        )

    def rest(self) -> Ranks:
        """The ranks for a rank that has failed: it makes the exchanges that are left, with NaN."""
        self.terms = dict.fromkeys(self.terms, UNKNOWN)
        self.skip, self._failed = self.made, True
        return self.ranks

    def _make(
        self, x: Tensor, exchange: Callable[[Tensor], Tensor], of_rows: Callable[[Tensor], Tensor]
    ) -> Tensor:
        if self.skip:
            self.skip -= 1
            return of_rows(x.expand(self._others.size, *x.shape))
        if self._failed and x.is_floating_point():
            x = torch.full_like(x, torch.nan)
        result = exchange(x) if self.made else self._first_of_all(x, exchange, of_rows)
        self.made += 1
        return result

    def _first_of_all(
        self, x: Tensor, exchange: Callable[[Tensor], Tensor], of_rows: Callable[[Tensor], Tensor]
    ) -> Tensor:
        words = x.contiguous().flatten().view(torch.int32)
        fits = len(words) <= ROOM
        given = pad(words, (0, ROOM - len(words))) if fits else words.new_zeros(ROOM)
        rows = self._others.gather(torch.cat((self._head(x.device), given)))
        wrong = self._differ(rows[:, :TERMS])
        if fits:
            mine = rows[:, TERMS : TERMS + len(words)].contiguous().view(x.dtype)
            x = of_rows(mine.view(self._others.size, *x.shape))
        else:
            x = exchange(x)
        return torch.where(wrong, torch.nan, x) if x.is_floating_point() else x

    def _head(self, device: torch.device) -> Tensor:
        """The terms as words: positive numbers, and 0 for a term that is not known."""
        words = [_word(term, device) for term in self.terms.values()]
        return torch.stack(words + [torch.zeros_like(words[0])] * (TERMS - len(words)))

    def _differ(self, heads: Tensor) -> Tensor:
        """Whether the heads [ranks, TERMS] differ in a term."""
        differs = ((heads != heads.amax(0)) & (heads != UNKNOWN + 1)).any(0)
        compiled = torch.compiler.is_compiling()
        if not compiled and (heads.device.type == "cpu" or self._first) and differs.any():
            self.in_step = False  # no rank waits for another any more
            raise RuntimeError(self._message(heads, differs))
        return differs.any()

    def _message(self, heads: Tensor, differs: Tensor) -> str:
        found = []
        for (name, term), words, differ in zip(self.terms.items(), heads.T.tolist(), differs, strict=False):
            if not differ:
                continue
            if isinstance(term, str):
                others = [rank for rank, word in enumerate(words) if word != words[self._others.rank]]
                found.append(f"{name} is {term} here and another on ranks {others}")
            else:
                numbers = [word - 1 for word in words]
                found.append(f"{name} is {numbers} on ranks 0 to {len(numbers) - 1}")
        return (
            "the ranks of a group must call the same loss at the same time with the same arguments, but "
            + "; ".join(found)
        )


def _word(term: Term, device: torch.device) -> Tensor:
    word = zlib.crc32(term.encode()) | 1 if isinstance(term, str) else term + 1
    return torch.full((), word & 0x7FFFFFFF, dtype=torch.int32, device=device)
