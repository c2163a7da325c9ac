"""Losses weighted by the data."""

from dataclasses import dataclass

import torch

from nvamp.objectives.base import Batch, Objective, Result
from nvamp.options import flag, option


@dataclass(frozen=True)
class TokenWeighted(Objective):
    """Cross-entropy with a weight w for each token, from the data:

        L = Σ w·ℓ / M            or, with `normalize`,
        L = Σ w·ℓ / (M·mean w)

    with ℓ the losses (nats) of the N valid tokens of all ranks, mean w the mean over those, and
    M = `num_items_in_batch`, by default N. So by default the second is the weighted mean Σ w·ℓ / Σ w; with
    `num_items_in_batch` it is that times N/M, and the micro-batches of a step add up to the mean of their
    weighted means, each by its number of tokens. For the weighted mean of a step, take the first, and give
    Σ w of the step for `num_items_in_batch`.

    The call takes `token_weight`, real numbers on the grid of the labels. It is a constant.

    Args:
        normalize: divide by the mean weight. If Σ w is 0, L is 0.

    Raises:
        TypeError, ValueError: an option of another type; no `token_weight`, or one that does not fit.

    Example:
        >>> loss = nvamp.Loss(TokenWeighted())(logits, labels, token_weight=token_weight)
    """

    normalize: bool = option(False, flag)

    inputs = ("token_weight",)

    def evaluate(self, batch: Batch) -> Result:
        weight = batch.inputs["token_weight"]
        if not self.normalize:
            return batch.mean(weight * batch.nll, weight)
        n, weights, total = batch.sums(weight, weight * batch.nll)
        _, share = batch.items(n)
        scale = torch.where(weights == 0, 0, share / weights)
        return Result(torch.where(weights == 0, 0, total * scale), per_token=weight * scale)
