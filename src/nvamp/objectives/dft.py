"""Dynamic fine-tuning: each token counts in proportion to its probability."""

from dataclasses import dataclass

from nvamp.objectives.base import Batch, Objective, Result


@dataclass(frozen=True)
class DFT(Objective):
    """Cross-entropy with the probability of the label as the constant weight of a token:

        L = Σ p · ℓ / M,   p = exp(−ℓ), held constant

    with ℓ the losses (nats) of the valid tokens and M = `num_items_in_batch`, by default their number. The
    weight of a token is p/M: a token that the model deems impossible teaches nothing.

    References:
        Wu et al., On the Generalization of SFT: A Reinforcement Learning Perspective with Reward
        Rectification, 2025: arXiv 2508.05629

    Example:
        >>> loss = nvamp.LinearLoss(DFT())(hidden, lm_head.weight, labels)
    """

    def evaluate(self, batch: Batch) -> Result:
        p = (-batch.nll).exp()
        return batch.mean(p * batch.nll, p)
