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

    with ℓ the losses (nats) of the N valid tokens of all ranks, mean w the mean over these tokens, and
    M = `num_items_in_batch`, by default N. By default the second is the weighted mean Σ w·ℓ / Σ w. With
    `num_items_in_batch` it is the weighted mean times N/M: the micro-batches of a step add up to the mean of
    their weighted means, weighted by their numbers of tokens. For the weighted mean of a step, take the first
    and give the Σ w of the step as `num_items_in_batch`.

    The call takes `token_weight`, real numbers shaped like the labels, which are constants.

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
