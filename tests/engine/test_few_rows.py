"""A few rows on a CPU, whose gradient is made together with the losses."""

from typing import Any

import pytest
import torch
from torch import Tensor

from nvamp.engine import ops
from nvamp.functional import token_nll
from tests import oracle
from tests.engine.problems import OPTIONS, gradients, layouts, make_problem


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("backend", ["chunked", "triton"])
@pytest.mark.parametrize("n", [1, ops.FEW_ROWS])
def test_few_rows(n: int, backend: str, options: dict[str, Any]) -> None:
    p = make_problem(n=n, ignored=0.3 if n > 1 else 0.0)
    _, (expected,) = gradients(lambda x: (p.token_weights * p.exact(x, **options)).sum(), p.logits)
    _, (got,) = gradients(
        lambda x: (p.token_weights * token_nll(x, p.labels, backend=backend, **options)).sum(), p.logits
    )
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_few_rows_are_as_accurate_as_eager(dtype: torch.dtype) -> None:
    """Of so few rows it is luck how they round, so these are many classes."""
    p = make_problem(n=16, d=64, v=20001, dtype=dtype, ignored=0)
    x, w = p.logits, p.token_weights
    truth = gradients(lambda x: (w.double() * p.exact(x)).sum(), x.double())
    ours = gradients(lambda x: (w * token_nll(x, p.labels)).sum(), x)
    eager = gradients(
        lambda x: (w * torch.nn.functional.cross_entropy(x.float(), p.labels, reduction="none")).sum(), x
    )
    error, limit = (oracle.relative_error(got[1][0], truth[1][0]) for got in (ours, eager))
    assert ours[1][0].dtype == dtype
    assert error <= 1.1 * limit


def test_logits_of_any_strides_and_shapes() -> None:
    for name, logits in layouts(torch.randn(3, 5, 7, dtype=torch.float64)).items():
        labels = torch.randint(7, logits.shape[:-1])
        w = torch.rand(labels.shape, dtype=torch.float64)

        def eager(x: Tensor, labels: Tensor = labels, w: Tensor = w) -> Tensor:
            nll = torch.nn.functional.cross_entropy(x.flatten(0, -2), labels.flatten(), reduction="none")
            return (w.flatten() * nll).sum()

        _, (expected,) = gradients(eager, logits)
        _, (got,) = gradients(lambda x, y=labels, w=w: (w * token_nll(x, y)).sum(), logits)
        torch.testing.assert_close(got, expected, msg=name)


def test_the_forward_makes_the_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """One softmax; with more rows, in evaluation or with metrics there is a second one or none."""
    calls: list[int] = []
    softmax = torch.softmax
    monkeypatch.setattr(torch, "softmax", lambda *a, **k: calls.append(1) or softmax(*a, **k))
    for n, expected in ((ops.FEW_ROWS, 1), (ops.FEW_ROWS + 1, 2)):
        calls.clear()
        x = torch.randn(n, 50, requires_grad=True)
        token_nll(x, torch.zeros(n, dtype=torch.int64)).sum().backward()  # type: ignore[no-untyped-call]
        assert len(calls) == expected


def test_the_gradient_is_not_to_be_differentiated_again() -> None:
    for of in (torch.sum, lambda nll: nll.square().sum()):
        x = torch.randn(2, 5, requires_grad=True)
        (grad,) = torch.autograd.grad(of(token_nll(x, torch.tensor([1, 2]))), x, create_graph=True)
        with pytest.raises(NotImplementedError, match="second derivatives"):
            torch.autograd.grad(grad.sum(), x)


@pytest.mark.parametrize("which", [0, 1])
def test_inputs_that_change_before_the_backward_are_an_error(which: int) -> None:
    inputs = torch.randn(2, 5, requires_grad=True), torch.tensor([1, 2])
    x, y = inputs[0] * 1, inputs[1]
    nll = token_nll(x, y)
    with torch.no_grad():
        (x, y)[which].mul_(0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        nll.sum().backward()  # type: ignore[no-untyped-call]
