"""The NVAMP objective as a function of the per-token losses, and nothing else.

With `ℓ` the losses (nats) of the `N` valid tokens of a batch and `M = num_items_in_batch` (default `N`):

    μ = mean ℓ        σ = sqrt(mean (ℓ − μ)² + ε)        z = (ℓ − μ) / σ        d = mean |z|
    C = Σ ℓ / M       X = max ℓ

    L = α·d·C + β·C + γ·X·(N/M)

The value is the same in every gradient mode; the weight `w_i = ∂L/∂ℓ_i` of a token is the choice.
All shapes are static and all results tensors: nothing here waits for the device. A batch may lie on several
ranks: what they exchange, `Ranks`, is two small tables of sums.

References:
    NVAMP loss, Mariusz Kurman, 2025: https://github.com/mkurman/nvamp-loss
"""

from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn.functional import pad

from nvamp.ranks import ALONE, Ranks

Gradient = Literal["scalar", "token", "detached", "full"]
GRADIENTS: tuple[Gradient, ...] = get_args(Gradient)


class Statistics(NamedTuple):
    """What the objective needs to know of a batch: scalar tensors, losses in nats."""

    num_tokens: Tensor  # N, in the dtype of the losses
    num_items: Tensor | float  # M
    share: Tensor | float  # N/M, 1 if M is N
    cross_entropy: Tensor  # C
    mean: Tensor  # μ
    std: Tensor  # σ, with ε
    dispersion: Tensor  # d
    mean_sign: Tensor  # of ℓ − μ
    max: Tensor  # X; 0 if no token is valid
    max_index: Tensor  # int64, first of equals; −1 if no token is valid, or another rank has the largest


class Result(NamedTuple):
    """The loss of a batch, and what its backward needs."""

    loss: Tensor  # L
    weights: Tensor  # w_i [tokens]; or a scalar, that of Σ ℓ
    at_max: Tensor | None  # in the latter case that of X; None for 0
    statistics: Callable[[], Statistics]


def statistics(
    nll: Tensor,
    valid: Tensor,
    num_items_in_batch: Tensor | float | None = None,
    *,
    eps: float = 1e-6,
    ranks: Ranks = ALONE,
    moments: int = 3,
) -> Statistics:
    """Statistics of `nll` [tokens] over the tokens that are `valid` [tokens] (bool), on all ranks.

    The losses of the others must be 0. The three `moments` are variance, dispersion and mean sign; with 2 of
    them the mean sign is 0, and with none so are μ, σ and d, or NaN if a loss is not finite.
    """
    ignored = ~valid
    n, total = valid.sum(dtype=nll.dtype), nll.sum()
    candidates = nll.masked_fill(ignored, -torch.inf)
    if torch.compiler.is_compiling() or not nll.numel():  # a graph is for any number of tokens
        candidates = pad(candidates, (0, 1), value=-torch.inf)
    largest, index = candidates.max(0)
    # The mean is taken of ℓ − X, so that the deviations of equal losses are exact zeros.
    below = (nll - largest).masked_fill(ignored, 0).sum() if moments else total
    if ranks is ALONE:
        elsewhere = n == 0
        largest = largest.masked_fill(elsewhere, 0)
    else:
        n, total, largest, below, elsewhere = _of_all(ranks, n, total, largest, below)
    index = index.masked_fill(elsewhere, -1)

    some = n.clamp(min=1)
    m: Tensor | float = some
    share: Tensor | float = 1.0
    if isinstance(num_items_in_batch, Tensor):
        m = num_items_in_batch.to(nll.dtype).clamp(min=1)  # wherever it is: to move it would wait
    elif num_items_in_batch is not None:
        m = max(num_items_in_batch, 1)
    if num_items_in_batch is not None:
        share = n / m
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
    """N, Σ ℓ, X and Σ (ℓ − X) of all ranks, from those of this one; and whether another rank has X."""
    own = torch.stack((n, total, largest, below))
    counts, sums, maxima, belows = ranks.gather(own).unbind(1)
    n, owner = counts.sum(), maxima.argmax()
    largest = torch.where(n > 0, maxima.gather(0, owner[None])[0], 0)
    belows = torch.where(counts > 0, belows + counts * (maxima - largest), 0)
    return n, sums.sum(), largest, belows.sum(), ~((n > 0) & (owner == ranks.rank))


def value(s: Statistics, *, alpha: float, beta: float, gamma: float) -> Tensor:
    """L, a scalar in nats."""
    # L = α·d·C + β·C + γ·X·(N/M)
    loss = (alpha * s.dispersion + beta) * s.cross_entropy
    return loss + gamma * s.max * s.share if gamma else loss


def shared_weight(
    s: Statistics, *, alpha: float, beta: float, gamma: float, gradient: Gradient
) -> tuple[Tensor, Tensor | float]:
    """The two numbers `(a, b)` of `w_i = a + b·[i = argmax]`.

    Modes `"scalar"` and `"detached"` are no more than that: they need only sum and maximum of the losses.
    """
    if gradient == "detached":
        return alpha * s.dispersion / s.num_items, 0.0
    return (alpha * s.dispersion + beta) / s.num_items, gamma * s.share


def weights(
    nll: Tensor,
    valid: Tensor,
    s: Statistics,
    *,
    alpha: float,
    beta: float,
    gamma: float,
    gradient: Gradient,
) -> Tensor:
    """`w_i` of every token: like `nll` [tokens], 0 where `valid` [tokens] does not hold."""
    # scalar     (α·d + β)/M + γ·(N/M)·[i = argmax]
    # token      (α·|z_i| + β)/M + γ·(N/M)·[i = argmax]
    # detached   α·d/M
    # full       scalar + α·C·[(s_i − mean s) − d·z_i]/(N·σ),   s_i = sign(ℓ_i − μ)
    shared, at_max = shared_weight(s, alpha=alpha, beta=beta, gamma=gamma, gradient=gradient)
    if alpha and gradient == "token":
        z = (nll - s.mean) / s.std
        shared = (alpha * z.abs() + beta) / s.num_items
    elif alpha and gradient == "full":
        n, deviation = s.num_tokens.clamp(min=1), nll - s.mean
        d_dispersion = ((deviation.sign() - s.mean_sign) - s.dispersion * (deviation / s.std)) / (n * s.std)
        shared = shared + alpha * s.cross_entropy * d_dispersion
    if gamma and gradient != "detached":
        is_max = torch.arange(nll.numel(), device=nll.device) == s.max_index
        shared = torch.where(is_max, shared + at_max, shared)
    return torch.where(valid, shared, 0)


def evaluate(
    nll: Tensor,
    valid: Tensor,
    num_items_in_batch: Tensor | float | None,
    *,
    alpha: float,
    beta: float,
    gamma: float,
    eps: float,
    gradient: Gradient,
    ranks: Ranks,
    per_token: bool,
    all_moments: bool,
) -> Result:
    """The loss of `nll` [tokens], and the weights of all tokens, or those of their sum and maximum.

    Only what these need is computed, unless `all_moments`.
    """
    moments = 3 if all_moments or ranks is not ALONE or gradient == "full" else 2
    if not (alpha or all_moments) and ranks is ALONE:
        moments = 0
    s = statistics(nll, valid, num_items_in_batch, eps=eps, ranks=ranks, moments=moments)
    loss = value(s, alpha=alpha, beta=beta, gamma=gamma)
    if per_token:
        w = weights(nll, valid, s, alpha=alpha, beta=beta, gamma=gamma, gradient=gradient)
        return Result(loss, w, None, lambda: s)
    shared, at_max = shared_weight(s, alpha=alpha, beta=beta, gamma=gamma, gradient=gradient)
    # A rank without the largest loss of all has one of its own, which weighs nothing more.
    here = at_max * (s.max_index >= 0).to(nll.dtype) if gamma and gradient != "detached" else None
    return Result(loss, shared, here, lambda: s)
