"""Focal loss: less weight on tokens that are predicted well."""

from dataclasses import dataclass

import torch

from nvamp.objectives.base import Batch, Objective, Result
from nvamp.options import between, option


@dataclass(frozen=True)
class Focal(Objective):
    """Cross-entropy with less weight on the tokens that are predicted well:

        L = Σ (1 − p)^gamma · ℓ / M,   p = exp(−ℓ)

    with ℓ the losses (nats) of the valid tokens and M = `num_items_in_batch`, by default their number. The
    gradient is the exact derivative, through p as well.

    Args:
        gamma: at least 0; 0 is cross-entropy.

    References:
        Lin et al., Focal Loss for Dense Object Detection, 2017: arXiv 1708.02002

    Example:
        >>> loss = nvamp.LinearLoss(Focal(gamma=2))(hidden, lm_head.weight, labels)
    """

    gamma: float = option(2.0, between(0))

    def evaluate(self, batch: Batch) -> Result:
        ell = batch.nll.clamp(min=0)  # a loss computed elsewhere may be rounded to below 0
        p = (-ell).exp()
        miss = -torch.expm1(-ell)  # 1 − p
        power = miss**self.gamma
        # d/dℓ (1 − p)^γ·ℓ = (1 − p)^γ + γ·p·ℓ·(1 − p)^γ/(1 − p), and ℓ/(1 − p) → 1 for ℓ → 0
        ratio = torch.where(miss > 0, ell * power / miss, power)
        return batch.mean(power * ell, power + self.gamma * p * ratio)
