"""Objectives of your own: each is a class of a few lines, and one line in the registry.

Run it: it trains a toy head with each of them, from logits and from hidden states.

Needs: `pip install nvamp-loss`.
"""

from dataclasses import dataclass

import torch

from nvamp import LinearLoss, Loss
from nvamp.objectives import OBJECTIVES, Batch, Objective, Result, parse
from nvamp.options import between, option


@dataclass(frozen=True)
class Hinge(Objective):
    """Cross-entropy without the tokens that are predicted well enough:

        L = Σ max(0, ℓ − margin) / M

    with ℓ the losses (nats) of the valid tokens and M = `num_items_in_batch`, by default their number. The
    weight of a token is 1/M if its loss is above the margin, else 0.

    Args:
        margin: in nats, at least 0.
    """

    margin: float = option(0.5, between(0))

    def evaluate(self, batch: Batch) -> Result:
        above = batch.nll - self.margin
        return batch.mean(above.clamp(min=0), (above > 0).to(above.dtype))


@dataclass(frozen=True)
class Spread(Objective):
    """Cross-entropy and a penalty on the variance of the losses:

        L = (N/M) · (μ + strength · mean (ℓ − μ)²),   μ = mean ℓ

    with ℓ the losses (nats) of the N valid tokens and M = `num_items_in_batch`, by default N. The gradient is
    the exact derivative: the weight of a token is (1 + 2·strength·(ℓ − μ))/M.

    Args:
        strength: in 1/nats, at least 0.
    """

    strength: float = option(0.1, between(0))

    def evaluate(self, batch: Batch) -> Result:
        n, total = batch.sums(batch.nll)
        deviation = batch.nll - total / n.clamp(min=1)
        return batch.mean(
            batch.nll + self.strength * deviation**2,
            1 + 2 * self.strength * deviation,
        )


def main() -> None:
    OBJECTIVES["hinge"] = Hinge
    OBJECTIVES["spread"] = Spread
    torch.manual_seed(0)
    hidden, labels = torch.randn(4, 64, 32), torch.randint(1000, (4, 64))
    labels[:, :16] = -100  # the prompts
    for name in ("hinge:margin=1", "spread"):
        of_logits, of_hidden = Loss(parse(name)), LinearLoss(parse(name))
        weight = torch.zeros(1000, 32, requires_grad=True)
        optimizer = torch.optim.Adam([weight], lr=0.1)
        values = []
        for step in range(50):
            optimizer.zero_grad()
            # Both are the same loss; the second never holds all logits.
            value = of_hidden(hidden, weight, labels) if step % 2 else of_logits(hidden @ weight.T, labels)
            value.backward()
            optimizer.step()
            values.append(value.item())
        print(f"{name} {values[0]:.4f} to {values[-1]:.4f}")


if __name__ == "__main__":
    main()
