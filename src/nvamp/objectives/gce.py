"""Generalized cross-entropy: between cross-entropy and the probability of a mistake."""

from dataclasses import dataclass

import torch

from nvamp.objectives.base import Batch, Objective, Result
from nvamp.options import between, option


@dataclass(frozen=True)
class GCE(Objective):
    """Generalized cross-entropy, in which wrong labels have less influence than in cross-entropy:

        L = Σ (1 − p^q)/q / M,   p = exp(−ℓ)

    with ℓ the losses (nats) of the valid tokens and M = `num_items_in_batch`, by default their number. The
    gradient is the exact derivative: the weight of a token is p^q/M.

    Args:
        q: in [0, 1]; 0 is cross-entropy, the limit, and 1 the mean probability of a mistake.

    Raises:
        TypeError, ValueError: an option of another type, or out of range.

    References:
        Zhang & Sabuncu, Generalized Cross Entropy Loss for Training Deep Neural Networks with Noisy Labels,
        2018: arXiv 1805.07836

    Example:
        >>> loss = nvamp.LinearLoss(GCE(q=0.7))(hidden, lm_head.weight, labels)
    """

    q: float = option(0.7, between(0, 1))

    def evaluate(self, batch: Batch) -> Result:
        if not self.q:
            return batch.mean(batch.nll, torch.ones_like(batch.nll))
        x = -self.q * batch.nll  # log p^q
        return batch.mean(-torch.expm1(x) / self.q, x.exp())
