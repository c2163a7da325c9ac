"""NVAMP as it was first published, written plainly from its description.

It is the yardstick of the benchmarks, and of the tests if no label is ignored: the published code took its
statistics over all positions and counted ignored ones as losses of zero.

References:
    https://github.com/mkurman/nvamp-loss, the version whose gradient is detached
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def original_nvamp(
    logits: Tensor,
    labels: Tensor,
    alpha: float = 1.0,
    beta: float = 0.02,
    gamma: float = 0.001,
    eps: float = 1e-6,
    ignore_index: int = -100,
) -> Tensor:
    """The loss of logits [batch, seq, vocab] and labels [batch, seq], with its copies and host syncs."""
    x = logits.float() if logits.dtype != torch.float64 else logits
    x = x[:, :-1].contiguous().view(-1, x.shape[-1])
    y = labels[:, 1:].contiguous().view(-1)
    losses = F.cross_entropy(x, y, ignore_index=ignore_index, reduction="none")
    cross_entropy = losses.mean()
    std = torch.sqrt(losses.var(correction=0) + eps)
    dispersion = ((losses - cross_entropy).abs() / std).mean().item()
    return alpha * dispersion * cross_entropy + beta * cross_entropy.item() + gamma * losses.max().item()
