"""Cross-entropy: the mean of the losses."""

from dataclasses import dataclass

import torch

from nvamp.objectives.base import Batch, Objective, Result


@dataclass(frozen=True)
class CrossEntropy(Objective):
    """The mean of the losses ℓ (nats) of the valid tokens:

        L = Σ ℓ / M

    with M = `num_items_in_batch`, by default the number of valid tokens.

    Example:
        >>> loss = nvamp.LinearLoss(CrossEntropy())(hidden, lm_head.weight, labels)
    """

    def few_weights(self, tokens: int) -> int:
        return 0

    def evaluate(self, batch: Batch) -> Result:
        n, total = batch.sums(batch.nll)
        m, _ = batch.items(n)
        return Result(total / m, shared=torch.ones_like(n) / m)
