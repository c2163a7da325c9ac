"""Log-probabilities without gradient, against their definition in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor

from nvamp.engine import linear
from nvamp.functional import logprobs
from tests import oracle
from tests.engine.problems import HALF, make_problem
from tests.engine.test_engine import TIGHT, with_backend

with_model = pytest.mark.parametrize(
    "model", [{}, {"softcap": 4.0}, {"softcap": 4.0, "logit_scale": -0.5}], ids=str
)


def exact(logits: Tensor, temperature: float, **model: Any) -> Tensor:
    """log p [N, V] of float64 logits."""
    z = model.get("logit_scale", 1) * logits
    if "softcap" in model:
        z = model["softcap"] * torch.tanh(z / model["softcap"])
    return torch.log_softmax(z / temperature, -1)


@with_model
@with_backend
@pytest.mark.parametrize("temperature", [1, 0.7])
def test_definition(backend: str, model: dict[str, Any], temperature: float) -> None:
    p = make_problem()
    args = p.hidden.requires_grad_(), p.weight.requires_grad_(), p.labels, p.bias
    found, entropy = logprobs(*args, temperature=temperature, return_entropy=True, backend=backend, **model)
    log_p = exact(p.logits.detach(), temperature, **model)
    expected = log_p.gather(1, p.labels.clamp(min=0)[:, None])[:, 0].where(p.valid, 0)
    torch.testing.assert_close(found, expected, **TIGHT)
    torch.testing.assert_close(entropy, -(log_p.exp() * log_p).sum(-1).where(p.valid, 0), **TIGHT)
    assert torch.equal(logprobs(*args, temperature=temperature, backend=backend, **model) == 0, ~p.valid)
    assert not found.requires_grad
    assert not entropy.requires_grad


@pytest.mark.parametrize("dtype", [*HALF, torch.float32], ids=str)
def test_as_accurate_as_eager(dtype: torch.dtype) -> None:
    p = make_problem(n=64, v=999, dtype=dtype, ignored=0)
    truth = exact((p.hidden.double() @ p.weight.double().T) / 0.7, 1).gather(1, p.labels[:, None])[:, 0]
    eager = torch.log_softmax((p.hidden @ p.weight.T).float() / 0.7, -1).gather(1, p.labels[:, None])[:, 0]
    found = logprobs(p.hidden, p.weight, p.labels, temperature=0.7)
    assert oracle.relative_error(found, truth) <= 1.1 * oracle.relative_error(eager, truth)


def test_one_product_over_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the rows that have a label, a chunk at a time."""
    monkeypatch.setattr(linear, "chunk_rows", lambda *_: 5)
    p, rows, mm = make_problem(n=37), [], torch.mm

    def spy(a: Tensor, b: Tensor, **out: Any) -> Tensor:
        rows.append(len(a))
        return mm(a, b, **out)

    monkeypatch.setattr(torch, "mm", spy)
    logprobs(p.hidden.requires_grad_(), p.weight, p.labels, return_entropy=True)
    assert sum(rows) == p.valid.sum()
    assert max(rows) == 5


def test_errors() -> None:
    p = make_problem()
    with pytest.raises(ValueError, match="temperature must be finite and above 0, got 0"):
        logprobs(p.hidden, p.weight, p.labels, temperature=0)
    with pytest.raises(TypeError, match=r"logprobs\(\) got an unexpected keyword argument 'z_loss'"):
        logprobs(p.hidden, p.weight, p.labels, z_loss=0.1)  # type: ignore[call-overload]
