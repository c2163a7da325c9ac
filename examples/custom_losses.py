"""Losses of your own on the engine: each is arithmetic on the N per-token losses.

None of them sees logits, and none holds more of them than a chunk. Run it: it trains a toy head on each.

Needs: `pip install nvamp-loss`.
"""

import torch
from torch import Tensor

from nvamp.functional import linear_token_nll

IGNORED = -100


def mean_over_valid(per_token: Tensor, labels: Tensor) -> Tensor:
    return per_token.sum() / (labels != IGNORED).sum().clamp(min=1)


def focal_loss(hidden: Tensor, weight: Tensor, labels: Tensor, gamma: float = 2.0) -> Tensor:
    """(1 − p)^γ · nll, p the probability of the label. Lin et al. 2017, arXiv:1708.02002."""
    nll = linear_token_nll(hidden, weight, labels)
    return mean_over_valid((1 - torch.exp(-nll)) ** gamma * nll, labels)


def dft_loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """p · nll with p held constant: Dynamic Fine-Tuning. Wu et al. 2025, arXiv:2508.05629."""
    nll = linear_token_nll(hidden, weight, labels)
    return mean_over_valid(torch.exp(-nll.detach()) * nll, labels)


def weighted_loss(hidden: Tensor, weight: Tensor, labels: Tensor, token_weight: Tensor) -> Tensor:
    """Σ wᵢ·nllᵢ / Σ wᵢ over the valid tokens, for weights that come with the data."""
    nll = linear_token_nll(hidden, weight, labels)
    return (token_weight * nll).sum() / (token_weight * (labels != IGNORED)).sum().clamp(min=1e-12)


def main() -> None:
    torch.manual_seed(0)
    hidden, labels = torch.randn(4, 64, 32), torch.randint(1000, (4, 64))
    labels[:, :16] = IGNORED  # the prompts
    for loss in (focal_loss, dft_loss, lambda h, w, y: weighted_loss(h, w, y, torch.rand(4, 64))):
        weight = torch.zeros(1000, 32, requires_grad=True)
        optimizer = torch.optim.Adam([weight], lr=0.1)
        values = []
        for _ in range(50):
            optimizer.zero_grad()
            value = loss(hidden, weight, labels)
            value.backward()
            optimizer.step()
            values.append(value.item())
        print(f"{getattr(loss, '__name__', 'loss')}: {values[0]:.4f} to {values[-1]:.4f}")


if __name__ == "__main__":
    main()
