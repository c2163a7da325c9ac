"""Losses weighted by the entropy of the prediction: EAFT and MiLe."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from nvamp.objectives.base import Batch, Objective, Result
from nvamp.options import between, one_of, option

Kind = Literal["eaft", "mile"]
LARGEST = math.log(20)  # nats: the largest entropy of the 20 classes that EAFT looks at


@dataclass(frozen=True)
class EntropyWeighted(Objective):
    """Cross-entropy, weighted by a function of the entropy of the prediction, which is held constant:

        L = Σ w(H) · ℓ / M

        "eaft"   w = min(1, H/ln 20)^gamma: a token teaches little if the model is sure, right or wrong, so
                 that fine-tuning does not overwrite what it knows
        "mile"   w = (1 + H)^gamma: a token teaches more if the model is unsure

    with ℓ the losses and H the entropies (nats) of the valid tokens, and M = `num_items_in_batch`, by default
    their number. The weight of a token is w/M; no gradient flows through H.

    Both differ from the authors' code in one point. EAFT takes the entropy over the 20 likeliest classes,
    renormalized; here it is taken over all classes. If the other classes have the total probability m, the
    two entropies differ by at most h(m) + m·ln V, with h(m) = −m·ln m − (1 − m)·ln(1 − m) and V classes; the
    minimum keeps w in [0, 1]. MiLe's code divides w by its mean over the batch; here w stays as it is, so
    that micro-batches add up.

    Args:
        kind: "eaft" or "mile".
        gamma: the power, at least 0; 0 is cross-entropy, and both papers use 1.

    Raises:
        TypeError, ValueError: an option of another type, or out of range.

    References:
        Diao et al., Entropy-Adaptive Fine-Tuning, 2026: arXiv 2601.02151
        Su et al., MiLe Loss, 2023: arXiv 2310.19531

    Example:
        >>> loss = nvamp.LinearLoss(EntropyWeighted("mile"))(hidden, lm_head.weight, labels)
    """

    kind: Kind = option("eaft", one_of(*get_args(Kind)))
    gamma: float = option(1.0, between(0))

    @property
    def needs_entropy(self) -> bool:
        return True

    def evaluate(self, batch: Batch) -> Result:
        assert batch.entropy is not None
        entropy = batch.entropy.clamp(min=0)  # rounding can make it negative
        base = (entropy / LARGEST).clamp(max=1) if self.kind == "eaft" else 1 + entropy
        weight = base**self.gamma
        return batch.mean(weight * batch.nll, weight)
