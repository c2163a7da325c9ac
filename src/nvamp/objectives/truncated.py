"""Loss truncation: the tokens with the largest losses do not count."""

from dataclasses import dataclass

import torch

from nvamp.objectives.base import Batch, Objective, Result
from nvamp.objectives.hardest import hardest, whole_tokens_of
from nvamp.options import between, option


@dataclass(frozen=True)
class Truncated(Objective):
    """Cross-entropy without the tokens that have the largest losses, which may be noise:

        L = Σ_{not T} ℓ / M

    with ℓ the losses (nats) of the N valid tokens, M = `num_items_in_batch`, by default N, and T the
    k = ⌊share·N⌋ tokens with the largest losses, ties by the lowest rank, then by the lowest index, but never
    all tokens. A token of T has the weight 0, and its loss may be infinite or NaN; any other token has 1/M.

    T is chosen among the tokens of a call, so each micro-batch has its own. The paper drops whole sequences,
    above a quantile that it estimates from past batches.

    Args:
        share: the share of the valid tokens that are dropped, in [0, 1]; 0 is cross-entropy.

    Raises:
        TypeError, ValueError: an option of another type, or out of range.

    References:
        Kang & Hashimoto, Improved Natural Language Generation via Loss Truncation, 2020: arXiv 2004.14589

    Example:
        >>> loss = nvamp.LinearLoss(Truncated(share=0.1))(hidden, lm_head.weight, labels)
    """

    share: float = option(0.1, between(0, 1))

    def evaluate(self, batch: Batch) -> Result:
        count = batch.sums()[0].long()
        dropped = whole_tokens_of(self.share, count).minimum(count - 1).clamp(min=0)
        kept = batch.valid & ~hardest(batch, dropped).among
        return batch.mean(torch.where(kept, batch.nll, 0), kept.to(batch.nll.dtype))
