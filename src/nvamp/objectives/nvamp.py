"""NVAMP: cross-entropy, weighted by the dispersion of the losses, and a penalty on the largest."""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from nvamp.objectives.base import Batch, Objective, Result, Statistics
from nvamp.objectives.hardest import hardest, most_tokens_of, tokens_of
from nvamp.objectives.statistics import statistics
from nvamp.options import TINY, between, one_of, option

Gradient = Literal["scalar", "token", "detached", "full"]
GRADIENTS: tuple[Gradient, ...] = get_args(Gradient)


@dataclass(frozen=True)
class NVAMP(Objective):
    """Cross-entropy, weighted by the dispersion of the losses, and a penalty on the largest losses.

    With ℓ the losses (nats) of the N valid tokens of a batch and M = `num_items_in_batch`, by default N:

        L = alpha·d·C + beta·C + gamma·X·(N/M)

        μ = mean ℓ,   σ = sqrt(mean (ℓ − μ)² + eps),   z = (ℓ − μ)/σ
        d = mean |z|, the dispersion: the shape of the distribution of the losses, not its width
        C = Σ ℓ / M, the cross-entropy
        X = mean of the k largest ℓ,   k = max(1, ⌈tail·N⌉)

    The value is the same in every gradient mode; the modes differ in the weight ∂L/∂ℓ_i of a token. T is the
    set of the k tokens with the largest losses (ties: lowest index first):

        "scalar"     (alpha·d + beta)/M + gamma·(N/M)·[i in T]/k; d is a constant
        "token"      alpha·|z_i|/M + beta/M + gamma·(N/M)·[i in T]/k
        "detached"   alpha·d/M, the loss as first published: beta and gamma change only the value
        "full"       "scalar" + alpha·C·[(s_i − mean s) − d·z_i]/(N·σ), s = sign(ℓ − μ): the exact derivative.
                     It does not train a model from scratch: making all tokens equally bad lowers d, and that
                     is easier than learning.

    Args:
        alpha: weight of the cross-entropy times the dispersion.
        beta: weight of the cross-entropy.
        gamma: weight of the penalty.
        eps: added to the variance, in nats².
        tail: share of the valid tokens whose mean loss is penalized; 0, as published, for the largest alone.
        gradient: one of the modes above.

    Raises:
        TypeError, ValueError: an option of another type, or out of range.

    References:
        Mariusz Kurman, NVAMP Loss, 2025: https://github.com/mkurman/nvamp-loss

    Example:
        >>> loss = nvamp.Loss(NVAMP(gamma=0.04, tail=0.05))(logits, labels)
    """

    alpha: float = option(1.0, between(0))
    beta: float = option(0.02, between(0))
    gamma: float = option(0.001, between(0))
    eps: float = option(1e-6, between(TINY))
    tail: float = option(0.0, between(0, 1))
    gradient: Gradient = option("scalar", one_of(*GRADIENTS))

    def few_weights(self, tokens: int) -> int | None:
        if self.mode == "detached" or not self.gamma:
            return 0 if self.mode in ("scalar", "detached") else None
        return most_tokens_of(self.tail, tokens) if self.mode == "scalar" else None

    def evaluate(self, batch: Batch) -> Result:
        s = statistics(batch, self.eps, self.moments)

        def found() -> Statistics:  # computed on demand: with alpha = 0, `s` has no moments
            return s if self.moments else statistics(batch, self.eps)

        # L = α·d·C + β·C + γ·X·(N/M)
        loss = (self.alpha * s.dispersion + self.beta) * s.cross_entropy
        penalty = None
        if self.gamma:
            largest, penalty = self._penalty(batch, s)
            loss = loss + self.gamma * largest * s.share
        if self.mode == "detached":
            return Result(loss, self.alpha * s.dispersion / s.num_items, statistics=found)
        if self.mode == "scalar":
            shared = (self.alpha * s.dispersion + self.beta) / s.num_items
            return Result(loss, shared, penalty, statistics=found)
        per_token = self._token(batch, s) if self.mode == "token" else self._full(batch, s)
        if penalty is not None:
            per_token = per_token + penalty
        return Result(loss, None, per_token, statistics=found)

    @property
    def mode(self) -> Gradient:
        """The gradient mode; if alpha is 0, all but "detached" are the same."""
        return self.gradient if self.alpha or self.gradient == "detached" else "scalar"

    @property
    def moments(self) -> int:
        """How many moments of `Statistics` the value and the weights need."""
        if not self.alpha:
            return 0
        return 3 if self.mode == "full" else 2

    def _penalty(self, batch: Batch, s: Statistics) -> tuple[Tensor, Tensor | None]:
        """X, and γ·(N/M)·[i in T]/k [tokens]; None if the penalty has no gradient."""
        if not self.tail:
            if self.mode == "detached":
                return s.max, None
            at = torch.arange(batch.nll.numel(), device=batch.nll.device) == s.max_index
            return s.max, at.to(batch.nll.dtype) * (self.gamma * s.share)
        tail = hardest(batch, tokens_of(self.tail, s.num_tokens.long()))
        weight = self.gamma * s.share / tail.k.clamp(min=1).to(batch.nll.dtype)
        return tail.mean, torch.where(tail.among, weight, torch.zeros_like(batch.nll))

    def _token(self, batch: Batch, s: Statistics) -> Tensor:
        deviation, std = _scaled(batch, s)
        return (self.alpha * (deviation / std).abs() + self.beta) / s.num_items

    def _full(self, batch: Batch, s: Statistics) -> Tensor:
        n, (deviation, std) = s.num_tokens.clamp(min=1), _scaled(batch, s)
        slope = ((deviation.sign() - s.mean_sign) - s.dispersion * (deviation / std)) / (n * std)
        shared = (self.alpha * s.dispersion + self.beta) / s.num_items
        return shared + self.alpha * (s.scale * s.cross_entropy) * slope


def _scaled(batch: Batch, s: Statistics) -> tuple[Tensor, Tensor]:
    """The deviations ℓ − μ [tokens] and σ, in units in which products of them do not overflow."""
    return s.scale * batch.nll - s.scale * s.mean, s.scale * s.std
