"""Small problems for the engine's tests."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests import oracle

IGNORED = -100
HALF = [torch.float16, torch.bfloat16]
DTYPES = [*HALF, torch.float32, torch.float64]
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "label_smoothing": {"label_smoothing": 0.1},
    "z_loss": {"z_loss": 1e-2},
    "softcap": {"softcap": 4.0},
    "logit_scale": {"logit_scale": 0.25},
    "all": {"label_smoothing": 0.1, "z_loss": 1e-2, "softcap": 4.0, "logit_scale": -0.5},
}


@dataclass
class Problem:
    """Logits of a linear head, labels of which some are ignored, and a weight per token of either sign."""

    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    bias: Tensor  # [V]
    labels: Tensor  # [N]
    token_weights: Tensor  # [N], in the dtype of losses

    @property
    def logits(self) -> Tensor:
        return torch.nn.functional.linear(self.hidden, self.weight, self.bias)

    @property
    def valid(self) -> Tensor:
        return self.labels != IGNORED

    def exact(self, logits: Tensor, **options: Any) -> Tensor:
        """Losses [N] in float64 of these logits, by the definition; 0 where ignored."""
        losses = oracle.token_losses(logits.double()[self.valid], self.labels[self.valid], **options)
        return torch.zeros(len(logits), dtype=torch.float64).index_put((self.valid,), losses)

    def exact_entropy(self, logits: Tensor, **options: Any) -> Tensor:
        """Entropies [N] in float64 of these logits, by the definition; 0 where ignored."""
        entropies = oracle.entropies(logits.double()[self.valid], **options)
        return torch.zeros(len(logits), dtype=torch.float64).index_put((self.valid,), entropies)


def make_problem(
    n: int = 23,
    d: int = 16,
    v: int = 61,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    ignored: float = 0.3,
) -> Problem:
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(v, (n,), generator=g)
    labels[torch.rand(n, generator=g) < ignored] = IGNORED
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return Problem(
        hidden=torch.randn(n, d, generator=g, dtype=torch.float64).to(dtype),
        weight=(torch.randn(v, d, generator=g, dtype=torch.float64) / 2).to(dtype),
        bias=torch.randn(v, generator=g, dtype=torch.float64).to(dtype),
        labels=labels,
        token_weights=torch.randn(n, generator=g, dtype=torch.float64).to(wide) / n,
    )


def gradients(loss: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The scalar loss(*inputs) and its gradients by the inputs."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    value = loss(*leaves)
    return value.detach(), list(torch.autograd.grad(value, leaves))


def with_gradient(f: Callable[[Tensor], Tensor], x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """f(x) [N], and the gradient of its weighted sum by x."""
    leaf = x.detach().requires_grad_()
    values = f(leaf)
    return values.detach(), torch.autograd.grad((weight * values).sum(), leaf)[0]


def assert_no_worse(
    got: tuple[Tensor, Tensor], eager: tuple[Tensor, Tensor], truth: tuple[Tensor, Tensor], factor: float
) -> None:
    """Values and gradient are at most so many times as far from the truth as those of eager."""
    for one, other, exact in zip(got, eager, truth, strict=True):
        assert oracle.relative_error(one, exact) <= factor * oracle.relative_error(other, exact)


def layouts(x: Tensor) -> dict[str, Tensor]:
    """The values of x [A, B, V] in memory of several layouts."""
    a, b, v = x.shape
    wide = x.new_full((a + 1, b + 2, v + 3), torch.nan)
    wide[1:, 1:-1, 2:-1] = x
    return {
        "contiguous": x,
        "slice": wide[1:, 1:-1, 2:-1],
        "transposed": x.permute(2, 1, 0).contiguous().permute(2, 1, 0),
        "batch second": x.transpose(0, 1).contiguous().transpose(0, 1),
        "every other": x.repeat_interleave(2, -1)[..., ::2],
    }
