"""Gradient accumulation with the dispersion of the whole step: two passes over its micro-batches.

A loss called on each micro-batch takes the dispersion of that micro-batch. Where that is too coarse, a first
pass without gradient finds the losses of all tokens, their weights follow, and the second pass applies them.
Run it: it prints how far both ways are from the gradient of the whole batch.

Needs: `pip install nvamp-loss`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nvamp import LinearNVAMPLoss
from nvamp.functional import linear_token_nll, token_weights
from nvamp.objectives import NVAMP, Objective

MicroBatch = tuple[Tensor, Tensor]  # inputs [rows, D], labels [rows]


def accumulate(
    body: nn.Module, head: nn.Linear, batch: Sequence[MicroBatch], objective: Objective, **options: Any
) -> None:
    """Adds the gradient of the loss of the whole batch to the parameters, a micro-batch at a time.

    Args:
        options: keyword arguments of `nvamp.functional.token_weights`, such as `process_group`.
    """
    with torch.no_grad():
        losses = [linear_token_nll(body(x), head.weight, y) for x, y in batch]
    valid = torch.cat([y != -100 for _, y in batch])
    weights = token_weights(objective, torch.cat(losses), valid, **options)
    for (x, y), weight in zip(batch, weights.split([len(y) for _, y in batch]), strict=True):
        (weight * linear_token_nll(body(x), head.weight, y)).sum().backward()


def main() -> None:
    torch.manual_seed(0)
    body, head = nn.Linear(16, 16), nn.Linear(16, 100, bias=False)
    x, y = torch.randn(64, 16), torch.randint(100, (64,))
    batch = list(zip(x.split(8), y.split(8), strict=True))
    criterion = LinearNVAMPLoss(gradient="token", shift=False)

    def gradient() -> Tensor:
        assert head.weight.grad is not None
        grad = head.weight.grad.clone()
        head.weight.grad = None
        return grad

    criterion(body(x), head.weight, y).backward()
    whole = gradient()
    for xs, ys in batch:
        criterion(body(xs), head.weight, ys, num_items_in_batch=len(y)).backward()
    print(f"dispersion of each micro-batch: off by {float((gradient() - whole).norm() / whole.norm()):.1e}")
    accumulate(body, head, batch, NVAMP(gradient="token"))
    print(f"two passes: off by {float((gradient() - whole).norm() / whole.norm()):.1e}")


if __name__ == "__main__":
    main()
