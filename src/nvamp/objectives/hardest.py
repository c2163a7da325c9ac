"""The tokens of a batch with the largest losses, on one or several ranks."""

from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from nvamp.objectives.base import Batch
from nvamp.ranks import ALONE

DIGIT = 16  # bits that one round of the selection across ranks decides
PARTS = 10**9  # a share is counted in parts of a billion, so that its number of tokens is exact

Count = TypeVar("Count", int, Tensor)


class Hardest(NamedTuple):
    """The k tokens with the largest losses, ties by the lowest rank, then by the lowest index."""

    k: Tensor  # int64, over all ranks
    among: Tensor  # [tokens] bool: whether a token of this rank is one of them
    mean: Tensor  # of their losses; 0 if there are none


def tokens_of(share: float, n: Tensor) -> Tensor:
    """k = max(1, ⌈share·n⌉) for an integer n; 0 for n = 0."""
    return _ceil(share, n).clamp(min=1).minimum(n)


def most_tokens_of(share: float, n: int) -> int:
    """The same for a Python integer n, and 1 for n = 0."""
    return max(_ceil(share, n), 1)


def whole_tokens_of(share: float, n: Tensor) -> Tensor:
    """⌊share·n⌋ for an integer n, rounded with the same care."""
    return n * (_parts(share) + 1) // PARTS


def _ceil(share: float, n: Count) -> Count:
    """⌈share·n⌉. One part is left out, so that ⌈1/6·6⌉ is 1 however 1/6 is rounded."""
    return -((n * (1 - _parts(share))) // PARTS)


def _parts(share: float) -> int:
    return round(share * PARTS)


def hardest(batch: Batch, count: Tensor) -> Hardest:
    """The hardest tokens; `count` is an int64 scalar, at most the number of valid tokens of all ranks.

    NaN is the largest of all. One rank sorts the losses. Several ranks count them by their leading bits,
    DIGIT bits a round: two all-reduces of 65536 counts for float32 (four for float64), and one of three
    numbers a rank. That does not grow with the batch.
    """
    if batch.ranks is ALONE:
        return _by_sorting(batch, count)
    return _by_counting(batch, count)


def _by_sorting(batch: Batch, count: Tensor) -> Hardest:
    losses = batch.nll.masked_fill(~batch.valid, -torch.inf)
    order = losses.argsort(descending=True, stable=True)
    first = torch.arange(len(order), device=order.device) < count
    among = torch.zeros_like(first).scatter(0, order, first)
    total = torch.where(among, batch.nll, 0).sum()
    return Hardest(count, among, total / count.clamp(min=1))


def _by_counting(batch: Batch, count: Tensor) -> Hardest:
    nll, ranks, key = batch.nll, batch.ranks, _ordered_bits(batch.nll)
    among = torch.zeros_like(batch.valid)
    tied, left = batch.valid, count  # tokens equal in all digits so far, and how many of them to take
    for shift in range(8 * key.element_size() - DIGIT, -1, -DIGIT):
        digit = ((key >> shift) & (2**DIGIT - 1)).long()
        counts = torch.zeros(2**DIGIT, dtype=torch.int64, device=key.device)
        counts = ranks.total(counts.scatter_add(0, digit, tied.long()))
        at_least = counts.flip(0).cumsum(0).flip(0)  # tokens with this digit or a larger one
        last = ((at_least >= left).sum() - 1).clamp(min=0)  # the digit of the last token to take
        left = left - (at_least - counts).gather(0, last[None])[0]
        among = among | (tied & (digit > last))
        tied = tied & (digit == last)
    # The tied tokens now have the same loss, and the first `left` of them are taken.
    loss = pad(nll.masked_fill(~tied, -torch.inf), (0, 1), value=-torch.inf).amax()
    own = torch.stack((tied.sum(dtype=nll.dtype), torch.where(among, nll, 0).sum(), loss))
    ties, sums, losses = ranks.gather(own).unbind(1)
    before = torch.where(torch.arange(ranks.size, device=nll.device) < ranks.rank, ties, 0).sum()
    among = among | (tied & (tied.cumsum(0) <= left - before))
    loss = losses.gather(0, (ties > 0).int().argmax()[None])[0]
    total = sums.sum() + torch.where(left > 0, loss * left, 0)
    return Hardest(count, among, total / count.clamp(min=1))


def _ordered_bits(x: Tensor) -> Tensor:
    """Integers whose bits, read as unsigned, are ordered as the floats are; NaN comes last."""
    integer = torch.int64 if x.dtype == torch.float64 else torch.int32
    x = torch.where(x.isnan(), torch.nan, torch.where(x == 0, 0.0, x))  # one NaN, and one zero
    bits = x.view(integer)
    lowest = torch.iinfo(integer).min
    return torch.where(bits < 0, ~bits, bits ^ lowest)
