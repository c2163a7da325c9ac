"""Mean, deviation, dispersion and maximum of the losses of a batch, on one or several ranks."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from nvamp.objectives.base import Batch, Statistics
from nvamp.ranks import ALONE, Ranks


def statistics(batch: Batch, eps: float = 1e-6, moments: int = 3) -> Statistics:
    """`Statistics` of the valid tokens of a batch.

    The three `moments` are variance, dispersion and mean sign. With 2 moments the mean sign is 0; with none
    μ, σ and d are 0 too, or NaN if a loss is not finite. On several ranks it takes two all-reduces, of 5·size
    and of 3 numbers.
    """
    nll, ranks, ignored = batch.nll, batch.ranks, ~batch.valid
    if ranks is not ALONE:
        moments = 3
    n = batch.valid.sum(dtype=nll.dtype)
    if torch.compiler.is_compiling() or not nll.numel():  # a graph serves any number of tokens
        nll, ignored = pad(nll, (0, 1)), pad(ignored, (0, 1), value=True)
    largest, index = nll.masked_fill(ignored, -torch.inf).max(0)
    if not moments:
        largest, index = largest.masked_fill(n == 0, 0), index.masked_fill(n == 0, -1)
        m, share = batch.items(n)
        cross_entropy = nll.sum() / m
        none = 0 * cross_entropy
        return Statistics(n, m, share, cross_entropy, none, none, none, none, largest, index, 1.0)

    scale = _scale_of(nll)
    x = scale * nll
    total = x.sum()
    # The mean is computed from ℓ − max ℓ, so that the deviations of equal losses are exact zeros.
    below = (x - scale * largest).masked_fill(ignored, 0).sum()
    if ranks is ALONE:
        elsewhere = n == 0
        largest = largest.masked_fill(elsewhere, 0)
    else:
        n, total, largest, below, scale, elsewhere = _of_all(ranks, n, total, largest, below, scale)
        x = scale * nll
    index = index.masked_fill(elsewhere, -1)

    some = n.clamp(min=1)
    m, share = batch.items(n)
    mean = scale * largest + below / some
    deviation = (x - mean).masked_fill(ignored, 0)
    sums = [deviation.square().sum(), deviation.abs().sum()]
    if moments == 3:
        sums.append(deviation.sign().sum())
    if ranks is not ALONE:
        sums = list(ranks.total(torch.stack(sums)).unbind())
    variance = sums[0] / some
    std = (variance + (eps * scale * scale).clamp(min=torch.finfo(nll.dtype).tiny)).sqrt()
    dispersion = sums[1] / some / std
    mean_sign = sums[2] / some if moments == 3 else torch.zeros_like(n)
    cross_entropy, mean, std = total / m / scale, mean / scale, std / scale
    return Statistics(n, m, share, cross_entropy, mean, std, dispersion, mean_sign, largest, index, scale)


def _scale_of(nll: Tensor) -> Tensor:
    """The power of two that brings losses below 2⁴¹, whose squares can be added up; 1 if they are.

    It is made of bits: its inverse may be too small for float32.
    """
    integer, mantissa, bias = (
        (torch.int64, 52, 1023) if nll.dtype == torch.float64 else (torch.int32, 23, 127)
    )
    exponent = torch.linalg.vector_norm(nll, torch.inf).view(integer) >> mantissa
    excess = (exponent - (bias + 40)).clamp(min=0, max=bias - 40)  # inf and NaN have the exponent bias + 1
    power: Tensor = (bias - excess) << mantissa
    return power.view(nll.dtype)


def _of_all(
    ranks: Ranks, n: Tensor, total: Tensor, largest: Tensor, below: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The same over all ranks, in the smallest of their scales, and whether another has the largest loss."""
    own = torch.stack((n, total, largest, below, scale))
    counts, sums, maxima, belows, scales = ranks.gather(own).unbind(1)
    n, owner, scale = counts.sum(), maxima.argmax(), scales.amin()
    largest = torch.where(n > 0, maxima.gather(0, owner[None])[0], 0)
    again = scale / scales
    belows = belows * again + counts * (scale * maxima - scale * largest)
    belows = torch.where(counts > 0, belows, 0).sum()
    return n, (sums * again).sum(), largest, belows, scale, ~((n > 0) & (owner == ranks.rank))
