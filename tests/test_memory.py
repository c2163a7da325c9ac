"""What the engine promises to hold, by the allocator's record."""

import pytest
import torch

from benchmarks.measure import peak_bytes
from nvamp import LinearNVAMPLoss, NVAMPLoss
from nvamp.objectives import GRADIENTS, Gradient

MiB = 2**20
with_gradient = pytest.mark.parametrize("gradient", GRADIENTS)
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


@with_gradient
@with_dtype
def test_linear_path(gradient: Gradient, dtype: torch.dtype) -> None:
    """Both gradients and 64 MiB, for logits of 256 MiB in float32."""
    hidden = torch.randn(1, 2048, 64).to(dtype).requires_grad_()
    weight = torch.randn(32768, 64).to(dtype).requires_grad_()
    labels = torch.randint(32768, (1, 2048))
    criterion = LinearNVAMPLoss(gradient=gradient)
    limit = hidden.nbytes + weight.nbytes + 64 * MiB
    assert peak_bytes(lambda: criterion(hidden, weight, labels).backward()) <= limit


@with_gradient
def test_wide_hidden_states_without_a_label(gradient: Gradient) -> None:
    """The causal shift leaves rows without a label; leaving them out takes no copy of the hidden states."""
    hidden = torch.randn(1, 16384, 1024, requires_grad=True)  # 64 MiB
    weight = torch.randn(500, 1024, requires_grad=True)
    labels = torch.randint(500, (1, 16384))
    criterion = LinearNVAMPLoss(gradient=gradient)
    limit = hidden.nbytes + weight.nbytes + 64 * MiB
    assert peak_bytes(lambda: criterion(hidden, weight, labels).backward()) <= limit


@with_gradient
def test_half_precision_over_many_chunks(gradient: Gradient) -> None:
    """More than four chunks are added up in float32: twice the weight, beside what is promised."""
    hidden = torch.randn(1, 1024, 32).bfloat16().requires_grad_()
    weight = torch.randn(131072, 32).bfloat16().requires_grad_()
    labels = torch.randint(131072, (1, 1024))
    criterion = LinearNVAMPLoss(gradient=gradient)
    limit = hidden.nbytes + 3 * weight.nbytes + 64 * MiB
    assert peak_bytes(lambda: criterion(hidden, weight, labels).backward()) <= limit


def test_one_pass_gradients_are_handed_over_not_copied() -> None:
    weight = torch.randn(32768, 256, requires_grad=True)  # 32 MiB
    hidden = torch.randn(1, 8, 256)
    labels = torch.randint(32768, (1, 8))
    assert peak_bytes(lambda: LinearNVAMPLoss()(hidden, weight, labels).backward()) < 1.5 * weight.nbytes
