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

Gradient = Literal["scalar", "token", "detached", "full"]
GRADIENTS: tuple[Gradient, ...] = get_args(Gradient)


class Ranks(NamedTuple):
    """The ranks that hold something together, as seen by one of them. By default it holds all of it."""

    rank: int = 0
    size: int = 1
    gather: Callable[[Tensor], Tensor] = lambda x: x[None]  # [k] of every rank -> [size, k]
    total: Callable[[Tensor], Tensor] = lambda x: x  # the sum of an x of every rank
    maximum: Callable[[Tensor], Tensor] = lambda x: x  # the largest of every rank, by element


ALONE = Ranks()


class Statistics(NamedTuple):
    """What the objective needs to know of a batch: scalar tensors, losses in nats."""

    num_tokens: Tensor  # N, in the dtype of the losses
    num_items: Tensor | float  # M
    cross_entropy: Tensor  # C
    mean: Tensor  # μ
    std: Tensor  # σ, with ε
    dispersion: Tensor  # d
    mean_sign: Tensor  # of ℓ − μ
    max: Tensor  # X; 0 where no token is valid
    max_index: Tensor  # int64, first of equals; −1 where no token is valid, or the largest is of another rank


def statistics(
    nll: Tensor,
    valid: Tensor,
    num_items_in_batch: Tensor | float | None = None,
    *,
    eps: float = 1e-6,
    ranks: Ranks = ALONE,
) -> Statistics:
    """Statistics of `nll` [tokens] over those tokens where `valid` [tokens] (bool) holds, on all ranks."""

    def sum_of(x: Tensor) -> Tensor:
        return torch.where(valid, x, 0).sum()

    candidates = pad(torch.where(valid, nll, -torch.inf), (0, 1), value=-torch.inf)  # never empty
    index = candidates.argmax()
    largest = candidates.gather(0, index[None])[0]
    # The mean is taken of ℓ − X, so that the deviations of equal losses are exact zeros.
    own = torch.stack((valid.sum().to(nll.dtype), sum_of(nll), largest, sum_of(nll - largest)))

    counts, sums, maxima, below = ranks.gather(own).unbind(1)
    n, owner = counts.sum(), maxima.argmax()
    largest = torch.where(n > 0, maxima.gather(0, owner[None])[0], 0)
    m: Tensor | float = n.clamp(min=1)
    if isinstance(num_items_in_batch, Tensor):
        m = num_items_in_batch.to(nll.dtype).clamp(min=1)  # wherever it is: to move it would wait
    elif num_items_in_batch is not None:
        m = max(num_items_in_batch, 1)
    below = torch.where(counts > 0, below + counts * (maxima - largest), 0)
    mean = largest + below.sum() / n.clamp(min=1)

    deviation = nll - mean
    moments = torch.stack((sum_of(deviation.square()), sum_of(deviation.abs()), sum_of(deviation.sign())))
    variance, spread, mean_sign = (ranks.total(moments) / n.clamp(min=1)).unbind()
    std = (variance + eps).sqrt()
    return Statistics(
        num_tokens=n,
        num_items=m,
        cross_entropy=sums.sum() / m,
        mean=mean,
        std=std,
        dispersion=spread / std,
        mean_sign=mean_sign,
        max=largest,
        max_index=torch.where((n > 0) & (owner == ranks.rank), index, -1),
    )


def value(s: Statistics, *, alpha: float, beta: float, gamma: float) -> Tensor:
    """L, a scalar in nats."""
    # L = α·d·C + β·C + γ·X·(N/M)
    return (alpha * s.dispersion + beta) * s.cross_entropy + gamma * s.max * (s.num_tokens / s.num_items)


def shared_weight(
    s: Statistics, *, alpha: float, beta: float, gamma: float, gradient: Gradient
) -> tuple[Tensor, Tensor | None]:
    """The two scalars `(a, b)` of `w_i = a + b·[i = argmax]`; None for a b of 0.

    Modes `"scalar"` and `"detached"` are no more than that: they need only sum and maximum of the losses.
    """
    if gradient == "detached":
        return alpha * s.dispersion / s.num_items, None
    # A rank without the largest loss of all has one of its own, which weighs nothing more.
    at_max = gamma * (s.num_tokens / s.num_items) * (s.max_index >= 0) if gamma else None
    return (alpha * s.dispersion + beta) / s.num_items, at_max


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
    deviation = nll - s.mean
    z = deviation / s.std
    if gradient == "token":
        shared = (alpha * z.abs() + beta) / s.num_items
    elif gradient == "full":
        n = s.num_tokens.clamp(min=1)
        d_dispersion = ((deviation.sign() - s.mean_sign) - s.dispersion * z) / (n * s.std)
        shared = shared + alpha * s.cross_entropy * d_dispersion
    if at_max is not None:
        shared = shared + at_max * (torch.arange(nll.numel(), device=nll.device) == s.max_index)
    return torch.where(valid, shared, 0)
