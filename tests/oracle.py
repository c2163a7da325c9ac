"""Float64 definitions that autograd differentiates: what every formula of the library is held against."""

from typing import Any

import torch
from torch import Tensor


def statistics(ell: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor, Tensor]:
    """μ, σ and z of the losses ell [N]."""
    mean = ell.sum() / len(ell)
    std = torch.sqrt(((ell - mean) ** 2).sum() / len(ell) + eps)
    return mean, std, (ell - mean) / std


def nvamp(
    ell: Tensor, alpha: float, beta: float, gamma: float, eps: float = 1e-6, items: float | None = None
) -> Tensor:
    """L of the losses ell [N] of the valid tokens."""
    n = len(ell)
    m = n if items is None else items
    dispersion = statistics(ell, eps)[2].abs().sum() / n
    cross_entropy = ell.sum() / m
    largest = ell[int(ell.argmax())]
    return alpha * dispersion * cross_entropy + beta * cross_entropy + gamma * largest * n / m


def surrogate(
    ell: Tensor,
    gradient: str,
    alpha: float,
    beta: float,
    gamma: float,
    eps: float = 1e-6,
    items: float | None = None,
) -> Tensor:
    """A function of ell [N] whose exact derivative is the gradient of the mode."""
    n = len(ell)
    m = n if items is None else items
    z = statistics(ell, eps)[2].detach()
    dispersion = z.abs().sum() / n
    largest = ell[int(ell.argmax())]
    match gradient:
        case "scalar":
            return (alpha * dispersion + beta) * ell.sum() / m + gamma * largest * n / m
        case "token":
            return ((alpha * z.abs() + beta) * ell).sum() / m + gamma * largest * n / m
        case "detached":
            return alpha * dispersion * ell.sum() / m
        case "full":
            return nvamp(ell, alpha, beta, gamma, eps, items)
    raise AssertionError(gradient)


def token_losses(
    logits: Tensor,
    labels: Tensor,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    class_weight: Tensor | None = None,
) -> Tensor:
    """Losses [N] of float64 logits [N, V] and labels [N], all of them valid."""
    z = logit_scale * logits
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    lse = torch.log(torch.exp(z - z.detach().amax(-1, keepdim=True)).sum(-1)) + z.detach().amax(-1)
    if class_weight is not None:
        one_hot = torch.nn.functional.one_hot(labels, z.shape[-1]).double()
        target = class_weight * ((1 - label_smoothing) * one_hot + label_smoothing / z.shape[-1])
        return (target * ((lse + z_loss * lse**2)[:, None] - z)).sum(-1)
    at_label = z[torch.arange(len(z)), labels]
    return (
        lse
        - (1 - label_smoothing) * at_label
        - (label_smoothing * z.mean(-1) if label_smoothing else 0)
        + z_loss * lse**2
    )


def entropies(logits: Tensor, softcap: float | None = None, logit_scale: float = 1.0, **_: Any) -> Tensor:
    """Entropies [N] in nats of the predictions of finite float64 logits; other options do not change them."""
    z = logit_scale * logits
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    log_p = torch.log_softmax(z, -1)
    return -(log_p.exp() * log_p).sum(-1)


def relative_error(x: Tensor, truth: Tensor) -> float:
    """‖x − truth‖ / ‖truth‖ in float64."""
    return float((x.double() - truth).norm() / truth.norm())
