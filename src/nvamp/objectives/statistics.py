"""Mean, deviation, dispersion and maximum of the losses of a batch, on one or several ranks."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from nvamp.objectives.base import Batch, Statistics
from nvamp.ranks import ALONE, Ranks


def statistics(batch: Batch, eps: float = 1e-6, moments: int = 3) -> Statistics:
    """`Statistics` of the valid tokens of a batch.

    The three `moments` are variance, dispersion and mean sign. With 2 moments the mean sign is 0; with none
    μ, σ and d are 0 too, or NaN if a loss is not finite. On several ranks it takes two all-reduces, of 4·size
    and of 3 numbers.
    """
    nll, ranks = batch.nll, batch.ranks
    if ranks is not ALONE:
        moments = 3
    ignored = ~batch.valid
    n, total = batch.valid.sum(dtype=nll.dtype), nll.sum()
    candidates = nll.masked_fill(ignored, -torch.inf)
    if torch.compiler.is_compiling() or not nll.numel():  # a graph serves any number of tokens
        candidates = pad(candidates, (0, 1), value=-torch.inf)
    largest, index = candidates.max(0)
    # The mean is computed from ℓ − max ℓ, so that the deviations of equal losses are exact zeros.
    below = (nll - largest).masked_fill(ignored, 0).sum() if moments else total
    if ranks is ALONE:
        elsewhere = n == 0
        largest = largest.masked_fill(elsewhere, 0)
    else:
        n, total, largest, below, elsewhere = _of_all(ranks, n, total, largest, below)
    index = index.masked_fill(elsewhere, -1)

    some = n.clamp(min=1)
    m, share = batch.items(n)
    cross_entropy = total / m
    if not moments:
        none = 0 * cross_entropy
        return Statistics(n, m, share, cross_entropy, none, none, none, none, largest, index)

    mean = largest + below / some
    deviation = (nll - mean).masked_fill(ignored, 0)
    sums = [deviation.square().sum(), deviation.abs().sum()]
    if moments == 3:
        sums.append(deviation.sign().sum())
    if ranks is not ALONE:
        sums = list(ranks.total(torch.stack(sums)).unbind())
    std = (sums[0] / some + eps).sqrt()
    dispersion = sums[1] / some / std
    mean_sign = sums[2] / some if moments == 3 else torch.zeros_like(n)
    return Statistics(n, m, share, cross_entropy, mean, std, dispersion, mean_sign, largest, index)


def _of_all(
    ranks: Ranks, n: Tensor, total: Tensor, largest: Tensor, below: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """N, Σ ℓ, max ℓ and Σ (ℓ − max ℓ) over all ranks, and whether another rank has the largest loss."""
    own = torch.stack((n, total, largest, below))
    counts, sums, maxima, belows = ranks.gather(own).unbind(1)
    n, owner = counts.sum(), maxima.argmax()
    largest = torch.where(n > 0, maxima.gather(0, owner[None])[0], 0)
    belows = torch.where(counts > 0, belows + counts * (maxima - largest), 0)
    return n, sums.sum(), largest, belows.sum(), ~((n > 0) & (owner == ranks.rank))
