"""The clipped policy gradient of PPO, GRPO and DAPO."""

from dataclasses import dataclass

import torch

from nvamp.objectives.base import Batch, Objective, Result
from nvamp.options import between, option, optional


@dataclass(frozen=True)
class ClippedPolicy(Objective):
    """The clipped policy gradient for tokens that the model has drawn, with advantages A:

        L = Σ w·[−min(r·A, clip(r, 1 − clip, 1 + clip_high)·A) + kl·(e^δ − δ − 1) − entropy·H] / M

        r = exp(logprob − old_logprob),   δ = ref_logprob − logprob,   logprob = −ℓ

    with ℓ the losses (nats) of the valid tokens, H the entropies of their predictions (nats), and
    M = `num_items_in_batch`, by default the number of valid tokens: a mean over tokens, as in DAPO. The
    middle term estimates the KL divergence from the reference policy. The gradient is the exact derivative,
    through H as well; the first term gives clipped tokens no gradient.

    The call takes `advantage`, `old_logprob` under the policy that drew the tokens, and `ref_logprob` under
    the reference policy, both in nats, and `token_weight` w. All four are shaped like the labels and
    constant. Without `old_logprob` the current model counts as the one that drew the tokens: r is 1, with its
    gradient. Without `token_weight`, w is 1. With 1/(tokens of the sequence) as w and the number of sequences
    as `num_items_in_batch`, L is the mean of the means of sequences, as in GRPO.

    Args:
        clip: how far below 1 the ratio r counts, in [0, 1].
        clip_high: how far above 1 it counts, at least 0; `None` for `clip`. DAPO uses 0.28.
        kl: weight of the KL divergence, at least 0. If it is above 0, `ref_logprob` is needed.
        entropy: weight of the entropy bonus, at least 0.

    Raises:
        TypeError, ValueError: an option of another type, or out of range; an input of the call that is
            missing or does not fit.

    References:
        Schulman et al., Proximal Policy Optimization Algorithms, 2017: arXiv 1707.06347
        Shao et al., DeepSeekMath, 2024, GRPO: arXiv 2402.03300
        Yu et al., DAPO, 2025: arXiv 2503.14476

    Example:
        >>> criterion = nvamp.LinearLoss(ClippedPolicy(clip=0.2, clip_high=0.28))
        >>> loss = criterion(hidden, lm_head.weight, labels, advantage=advantage, old_logprob=old_logprob)
    """

    clip: float = option(0.2, between(0, 1))
    clip_high: float | None = option(None, optional(between(0)))
    kl: float = option(0.0, between(0))
    entropy: float = option(0.0, between(0))

    optional_inputs = ("old_logprob", "ref_logprob", "token_weight")

    @property
    def inputs(self) -> tuple[str, ...]:
        return ("advantage", "ref_logprob") if self.kl else ("advantage",)

    @property
    def needs_entropy(self) -> bool:
        return self.entropy != 0

    def evaluate(self, batch: Batch) -> Result:
        ell, advantage = batch.nll, batch.inputs["advantage"]
        ratio = (-ell - batch.inputs.get("old_logprob", -ell)).exp()
        high = self.clip if self.clip_high is None else self.clip_high
        free, clipped = ratio * advantage, ratio.clamp(1 - self.clip, 1 + high) * advantage
        value = -torch.minimum(free, clipped)
        weight = torch.where(free > clipped, 0, free)  # ∂r/∂ℓ = −r
        if self.kl:
            delta = batch.inputs["ref_logprob"] + ell
            value = value + self.kl * (delta.expm1() - delta)
            weight = weight + self.kl * delta.expm1()
        w, entropy_weight = batch.inputs.get("token_weight", torch.ones_like(ell)), None
        if self.entropy:
            assert batch.entropy is not None
            value, entropy_weight = value - self.entropy * batch.entropy, -self.entropy * w
        return batch.mean(w * value, w * weight, entropy_weight)
