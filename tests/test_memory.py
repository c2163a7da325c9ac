"""What the engine promises to hold, by the allocator's record."""

import pytest
import torch

from benchmarks.measure import peak_bytes
from nvamp import LinearNVAMPLoss, NVAMPLoss
from nvamp.objectives import Gradient
from tests.parameters import with_gradient

MiB = 2**20
with_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@with_gradient
@with_dtype
def test_logits_path(gradient: Gradient, dtype: torch.dtype) -> None:
    """Forward: a tenth of the logits; backward: the gradient and a tenth."""
    x = torch.randn(2, 1024, 16000).to(dtype).requires_grad_()
    labels = torch.randint(16000, (2, 1024))
    criterion = NVAMPLoss(gradient=gradient)
    assert peak_bytes(lambda: criterion(x, labels)) <= 0.1 * x.nbytes
    loss = criterion(x, labels)
    assert x.nbytes <= peak_bytes(lambda: loss.backward()) <= 1.1 * x.nbytes


def peak_and_sizes(n: int, d: int, v: int, gradient: Gradient, dtype: torch.dtype) -> tuple[int, int, int]:
    """Bytes at the peak of forward and backward on the linear path; of hidden [1, n, d] and weight [v, d]."""
    hidden = torch.randn(1, n, d).to(dtype).requires_grad_()
    weight = torch.randn(v, d).to(dtype).requires_grad_()
    labels = torch.randint(v, (1, n))
    criterion = LinearNVAMPLoss(gradient=gradient)
    peak = peak_bytes(lambda: criterion(hidden, weight, labels).backward())
    return peak, hidden.nbytes, weight.nbytes


@with_gradient
@with_dtype
def test_linear_path(gradient: Gradient, dtype: torch.dtype) -> None:
    """Both gradients and 64 MiB, for logits of 256 MiB in float32."""
    peak, hidden, weight = peak_and_sizes(2048, 64, 32768, gradient, dtype)
    assert peak <= hidden + weight + 64 * MiB


@with_gradient
def test_wide_hidden_states_without_a_label(gradient: Gradient) -> None:
    """The causal shift leaves rows without a label; leaving them out takes no copy of the hidden states."""
    peak, hidden, weight = peak_and_sizes(16384, 1024, 500, gradient, torch.float32)
    assert hidden == 64 * MiB
    assert peak <= hidden + weight + 64 * MiB


@with_gradient
def test_half_precision_over_many_chunks(gradient: Gradient) -> None:
    """More than four chunks are added up in float32: twice the weight, beside what is promised."""
    peak, hidden, weight = peak_and_sizes(1024, 32, 131072, gradient, torch.bfloat16)
    assert peak <= hidden + 3 * weight + 64 * MiB


def test_one_pass_gradients_are_handed_over_not_copied() -> None:
    weight = torch.randn(32768, 256, requires_grad=True)  # 32 MiB
    hidden = torch.randn(1, 8, 256)
    labels = torch.randint(32768, (1, 8))
    assert peak_bytes(lambda: LinearNVAMPLoss()(hidden, weight, labels).backward()) < 1.5 * weight.nbytes
