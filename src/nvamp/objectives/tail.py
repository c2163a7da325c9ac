"""Tail: more weight on the tokens with the largest losses."""

from dataclasses import dataclass

import torch

from nvamp.objectives.base import Batch, Objective, Result
from nvamp.objectives.hardest import hardest, most_tokens_of, tokens_of
from nvamp.options import between, option


@dataclass(frozen=True)
class Tail(Objective):
    """Cross-entropy with more weight on the tokens with the largest losses:

        L = (Σ ℓ + strength · Σ_T ℓ) / M

    with ℓ the losses (nats) of the N valid tokens, M = `num_items_in_batch`, by default N, and T the
    k = max(1, ⌈share·N⌉) tokens with the largest losses, ties by the lowest rank, then by the lowest index.
    A token of T has the weight (1 + strength)/M, any other 1/M. Σ_T ℓ is k times the CVaR of the losses,
    their mean beyond a quantile.

    T is chosen among the tokens of a call, so each micro-batch has its own.

    Args:
        share: the share of the valid tokens in T, in [0, 1]; 0 for the largest loss alone.
        strength: the additional weight of T, at least 0; 0 is cross-entropy.

    Raises:
        TypeError, ValueError: an option of another type, or out of range.

    References:
        Rockafellar & Uryasev, Optimization of Conditional Value-at-Risk, 2000
        Fan et al., Learning with Average Top-k Loss, 2017: arXiv 1705.08826
        Bal et al., ESLM: Risk-Averse Selective Language Modeling, 2025: arXiv 2505.19893

    Example:
        >>> loss = nvamp.LinearLoss(Tail(share=0.05))(hidden, lm_head.weight, labels)
    """

    share: float = option(0.05, between(0, 1))
    strength: float = option(1.0, between(0))

    def few_weights(self, tokens: int) -> int:
        return most_tokens_of(self.share, tokens)

    def evaluate(self, batch: Batch) -> Result:
        n, total = batch.sums(batch.nll)
        m, _ = batch.items(n)
        tail = hardest(batch, tokens_of(self.share, n.long()))
        loss = (total + self.strength * (tail.k * tail.mean)) / m
        shared = torch.ones_like(n) / m
        return Result(loss, shared, torch.where(tail.among, self.strength * shared, 0))
