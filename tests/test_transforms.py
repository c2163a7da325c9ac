"""What `torch.func`, forward mode and second derivatives give: what is right, or an error that says what to do."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, jvp, vjp, vmap

from nvamp.engine import linear_nll_sum
from nvamp.functional import linear_nvamp_loss, linear_token_nll, nvamp_loss, token_nll, token_weights
from nvamp.objectives import NVAMP, Gradient
from tests.parameters import with_backend, with_fused, with_gradient

# PyTorch's own, when it first takes a derivative in forward mode.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")

G = torch.Generator().manual_seed(0)
HIDDEN = torch.randn(3, 5, 4, dtype=torch.float64, generator=G)
WEIGHT = torch.randn(7, 4, dtype=torch.float64, generator=G)
LABELS = torch.randint(7, (3, 5), generator=G)
LABELS[1, 2] = -100
TANGENT = torch.randn(3, 5, 4, dtype=torch.float64, generator=G)

# (hidden, labels, options) -> losses or loss
LOSSES: dict[str, Callable[..., Tensor]] = {
    "token_nll": lambda h, y=LABELS, **options: token_nll(h @ WEIGHT.T, y, **options),
    "linear_token_nll": lambda h, y=LABELS, **options: linear_token_nll(h, WEIGHT, y, **options),
    "nvamp_loss": lambda h, y=LABELS, **options: nvamp_loss(h @ WEIGHT.T, y, **options),
    "linear_nvamp_loss": lambda h, y=LABELS, **options: linear_nvamp_loss(h, WEIGHT, y, **options),
}
with_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


def forward_mode(f: Callable[[Tensor], Tensor]) -> Tensor | None:
    """The derivative of f at HIDDEN in the direction TANGENT; None where there is none."""
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(HIDDEN, TANGENT))).tangent


TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor]], Any]] = {
    "grad": lambda f: grad(f)(HIDDEN),
    "vjp": lambda f: vjp(f, HIDDEN),
    "jvp": lambda f: jvp(f, (HIDDEN,), (TANGENT,)),
    "jvp of vmap": lambda f: jvp(lambda h: vmap(f)(h[None]), (HIDDEN,), (TANGENT,)),
    "vmap of grad": lambda f: vmap(grad(f))(HIDDEN[None]),
    "forward mode": forward_mode,
}


@with_loss
@with_fused
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_fused_backends_refuse_derivatives_that_they_do_not_have(
    loss: Any, backend: str, transform: Any
) -> None:
    """PyTorch by itself would answer forward mode with 0."""
    with pytest.raises(NotImplementedError, match=f"backend '{backend}' has no .* use backend=\"reference\""):
        transform(lambda h: loss(h, backend=backend).sum())


@pytest.mark.parametrize("of", ["hidden", "weight", "bias"])
def test_a_tangent_of_any_input_is_refused(of: str) -> None:
    with forward_ad.dual_level():
        inputs = {"hidden": HIDDEN, "weight": WEIGHT, "bias": torch.zeros(7, dtype=torch.float64)}
        inputs[of] = forward_ad.make_dual(inputs[of], torch.ones_like(inputs[of]))
        for function in (linear_token_nll, partial(linear_nll_sum, few=0), linear_nvamp_loss):
            with pytest.raises(NotImplementedError, match="no forward-mode derivatives"):
                function(**inputs, labels=LABELS)


def test_forward_mode_of_something_else_is_none_of_its_business() -> None:
    with forward_ad.dual_level():
        forward_ad.make_dual(HIDDEN, TANGENT)
        linear_token_nll(HIDDEN, WEIGHT, LABELS)


@with_loss
@with_fused
@pytest.mark.parametrize("retain_graph", [None, False])
def test_second_derivatives_are_refused_when_they_are_taken(
    loss: Any, backend: str, retain_graph: bool | None
) -> None:
    h = HIDDEN.clone().requires_grad_()
    options = {"inplace_backward": True} if loss in (LOSSES["token_nll"], LOSSES["nvamp_loss"]) else {}
    value = loss(h, backend=backend, **options).sum()
    (first,) = torch.autograd.grad(value, h, create_graph=True, retain_graph=retain_graph)
    with pytest.raises(NotImplementedError, match='use backend="reference" for second derivatives'):
        torch.autograd.grad(first.square().sum(), h)


@with_gradient
@pytest.mark.parametrize(
    "loss", [LOSSES["nvamp_loss"], LOSSES["linear_nvamp_loss"]], ids=["logits", "linear"]
)
def test_transforms_of_the_reference(loss: Any, gradient: Gradient) -> None:
    """Forward mode and `torch.func` give the gradient of the mode; differentiated again, its weights are fixed."""

    def f(h: Tensor) -> Tensor:
        return loss(h, backend="reference", gradient=gradient)

    h = HIDDEN.clone().requires_grad_()
    (expected,) = torch.autograd.grad(f(h), h, create_graph=True)
    torch.testing.assert_close(grad(f)(HIDDEN), expected)
    along = (expected * TANGENT).sum()
    torch.testing.assert_close(jvp(f, (HIDDEN,), (TANGENT,))[1], along)
    torch.testing.assert_close(forward_mode(f), along)

    shifted = torch.cat([LABELS[:, 1:], LABELS.new_full((3, 1), -100)], 1)
    nll = token_nll(h @ WEIGHT.T, shifted, backend="reference").flatten()
    (by_nll,) = torch.autograd.grad(f(h), h, create_graph=True)
    weights = token_weights(NVAMP(gradient=gradient), nll, shifted.flatten() != -100)
    (of_fixed,) = torch.autograd.grad((weights * nll).sum(), h, create_graph=True)
    second = torch.autograd.grad((by_nll * TANGENT).sum(), h)
    torch.testing.assert_close(second, torch.autograd.grad((of_fixed * TANGENT).sum(), h))


@with_loss
@with_backend
def test_vmap(loss: Any, backend: str) -> None:
    """It is a loop; of gradients the reference alone has one."""
    each = torch.stack([loss(h, y, backend=backend) for h, y in zip(HIDDEN, LABELS, strict=True)])
    torch.testing.assert_close(vmap(lambda h, y: loss(h, y, backend=backend))(HIDDEN, LABELS), each)
    if backend == "reference":
        of_each = vmap(grad(lambda h, y: loss(h, y, backend=backend).sum()))(HIDDEN, LABELS)
        for h, y, got in zip(HIDDEN, LABELS, of_each, strict=True):
            x = h.clone().requires_grad_()
            (expected,) = torch.autograd.grad(loss(x, y, backend=backend).sum(), x)
            torch.testing.assert_close(got, expected)


@with_fused
def test_jacobian_by_batched_gradients(backend: str) -> None:
    h = HIDDEN.clone().requires_grad_()
    nll = linear_token_nll(h, WEIGHT, LABELS, backend=backend).flatten()
    rows = torch.eye(15, dtype=torch.float64)
    (batched,) = torch.autograd.grad(nll, h, rows, retain_graph=True, is_grads_batched=True)
    one_by_one = [torch.autograd.grad(nll, h, row, retain_graph=True)[0] for row in rows]
    torch.testing.assert_close(batched, torch.stack(one_by_one))


@pytest.mark.parametrize("loss", ["nvamp_loss", "linear_nvamp_loss"])
@with_fused
def test_batched_gradients_of_a_loss(loss: str, backend: str) -> None:
    """Where nothing keeps the graph, the backward of one gradient would work in place."""
    h = HIDDEN.clone().requires_grad_()
    options = {"inplace_backward": True} if loss == "nvamp_loss" else {}

    def value() -> Tensor:
        return LOSSES[loss](h, backend=backend, **options)

    twice = torch.tensor([1.0, -2.0], dtype=torch.float64)
    (batched,) = torch.autograd.grad(value(), h, twice, is_grads_batched=True)
    (one,) = torch.autograd.grad(value(), h)
    torch.testing.assert_close(batched, torch.stack((one, -2 * one)))
