"""Every objective once more, by its definition, in a form that autograd differentiates to its weights."""

import math

import torch
from torch import Tensor

from nvamp.objectives import (
    DFT,
    GCE,
    NVAMP,
    ClippedPolicy,
    CrossEntropy,
    EntropyWeighted,
    Focal,
    Objective,
    Tail,
    Tilted,
    TokenWeighted,
    Truncated,
)
from tests import oracle


def definition(
    o: Objective,
    ell: Tensor,
    items: float | Tensor | None = None,
    entropy: Tensor | None = None,
    **inputs: Tensor,
) -> Tensor:
    """L of the losses ell [N] of the valid tokens; what is held constant in the gradient is detached."""
    n = len(ell)
    m = float(n if items is None else items) or 1.0
    if n == 0:
        return ell.sum()
    p = (-ell).exp()
    match o:
        case CrossEntropy():
            return ell.sum() / m
        case NVAMP():
            return nvamp(o, ell, m)
        case Tail():
            k = max(1, math.ceil(o.share * n - 1e-9 * n))
            return (ell.sum() + o.strength * hardest_first(ell)[:k].sum()) / m
        case Tilted():
            return n / m * ((o.t * ell).logsumexp(0) - math.log(n)) / o.t
        case Truncated():
            k = min(n - 1, math.floor(o.share * n + 1e-9 * n))
            return hardest_first(ell)[k:].sum() / m
        case Focal():
            if o.gamma == 0:
                return ell.sum() / m
            positive = ell[ell > 0]  # of 0 both are 0, but autograd has NaN
            return ((1 - (-positive).exp()) ** o.gamma * positive).sum() / m
        case GCE():
            return (ell if o.q == 0 else (1 - p**o.q) / o.q).sum() / m
        case DFT():
            return (p.detach() * ell).sum() / m
        case EntropyWeighted():
            assert entropy is not None
            h = entropy.detach()
            weight = (h / math.log(20)).clamp(max=1) if o.kind == "eaft" else 1 + h
            return (weight**o.gamma * ell).sum() / m
        case TokenWeighted():
            weight = inputs["token_weight"]
            if not o.normalize:
                return (weight * ell).sum() / m
            return n / m * (weight * ell).sum() / weight.sum() if weight.sum() else 0 * ell.sum()
        case ClippedPolicy():
            return clipped_policy(o, ell, entropy, **inputs).sum() / m
    raise AssertionError(f"no definition of {type(o).__name__}")


def hardest_first(ell: Tensor) -> Tensor:
    return ell[ell.detach().sort(descending=True, stable=True).indices]


def nvamp(o: NVAMP, ell: Tensor, m: float) -> Tensor:
    n, z = len(ell), oracle.statistics(ell, o.eps)[2]
    k = max(1, math.ceil(o.tail * n - 1e-9 * n))
    penalty = o.gamma * hardest_first(ell)[:k].mean() * n / m
    value = (o.alpha * z.abs().mean() + o.beta) * ell.sum() / m + penalty
    weight = o.alpha * (z.abs() if o.gradient == "token" else z.abs().mean()).detach()
    match o.gradient:
        case "full":
            return value
        case "detached":
            of = (weight * ell).sum() / m
        case _:
            of = ((weight + o.beta) * ell).sum() / m + penalty
    return of + (value - of).detach()


def clipped_policy(
    o: ClippedPolicy,
    ell: Tensor,
    entropy: Tensor | None,
    advantage: Tensor,
    old_logprob: Tensor | None = None,
    ref_logprob: Tensor | None = None,
    token_weight: Tensor | float = 1.0,
) -> Tensor:
    logprob = -ell
    ratio = (logprob - (logprob.detach() if old_logprob is None else old_logprob)).exp()
    high = o.clip if o.clip_high is None else o.clip_high
    loss = -torch.minimum(ratio * advantage, ratio.clip(1 - o.clip, 1 + high) * advantage)
    if o.kl:
        assert ref_logprob is not None
        loss = loss + o.kl * ((ref_logprob - logprob).exp() - (ref_logprob - logprob) - 1)
    if o.entropy:
        assert entropy is not None
        loss = loss - o.entropy * entropy
    return token_weight * loss
