"""Tilted loss: a soft maximum, or minimum, of the losses."""

from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from nvamp.objectives.base import Batch, Objective, Result
from nvamp.options import not_zero, option


@dataclass(frozen=True)
class Tilted(Objective):
    """The tilted mean of the losses, which lies between their mean and the largest or smallest of them:

        L = (N/M) · (1/t) · log mean exp(t·ℓ)

    with ℓ the losses (nats) of the N valid tokens and M = `num_items_in_batch`, by default N. For t → 0 it is
    cross-entropy, for t → ∞ the largest loss, for t → −∞ the smallest. The gradient is the exact derivative:
    the weight of a token is (N/M)·softmax(t·ℓ), the softmax being over the tokens. Without a valid token L is
    0.

    The factor N/M makes the micro-batches of a step add up to the mean of their tilted means, weighted by
    their numbers of tokens; that is not the tilted mean of the step.

    Args:
        t: the tilt, in 1/nats, not 0. Hard tokens get more weight if it is above 0, less if below.

    Raises:
        TypeError, ValueError: an option of another type, or out of range.

    References:
        Li et al., Tilted Empirical Risk Minimization, 2020: arXiv 2007.01162

    Example:
        >>> loss = nvamp.Loss(Tilted(t=0.5))(logits, labels)
    """

    t: float = option(1.0, not_zero)

    def evaluate(self, batch: Batch) -> Result:
        sign = 1 if self.t > 0 else -1
        signed = (sign * batch.nll).masked_fill(~batch.valid, -torch.inf)
        extreme = sign * batch.ranks.maximum(pad(signed, (0, 1), value=-torch.inf).amax())
        # x is at most 0, and 0 for some token.
        x = torch.where(batch.valid, self.t * (batch.nll - extreme), -torch.inf)
        n, exps, exps_minus_1 = batch.sums(x.exp(), x.expm1())
        _, share = batch.items(n)
        # The logarithm of mean exp(x): log1p is exact near 1, log far from it.
        below_1 = exps_minus_1 / n
        log_mean = torch.where(below_1 > -0.5, below_1.log1p(), (exps / n).log())
        loss = torch.where(n == 0, 0, share * (extreme + log_mean / self.t))  # NaN if n is
        return Result(loss, per_token=share * x.exp() / exps.clamp(min=1))
