"""NVAMP on per-token losses, against float64 autograd of its definition."""

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from nvamp import TokenNVAMPLoss
from nvamp.functional import token_weights
from nvamp.objectives import GRADIENTS, NVAMP, Batch, Gradient, Result
from nvamp.objectives.statistics import statistics
from tests import oracle
from tests.strategies import examples

WEIGHTS = {"alpha": 1.0, "beta": 0.02, "gamma": 0.001}

losses = st.lists(st.floats(0, 20, width=32), min_size=1, max_size=40).map(
    lambda values: torch.tensor(values, dtype=torch.float64)
)
coefficients = st.fixed_dictionaries(
    {name: st.sampled_from([0.0, 0.001, 0.02, 1.0, 3.0]) for name in WEIGHTS}
)
items = st.none() | st.integers(1, 100)


def batch_of(ell: Tensor, valid: Tensor | None = None, items: Tensor | float | None = None) -> Batch:
    return Batch(ell, torch.ones_like(ell, dtype=torch.bool) if valid is None else valid, items)


def weights_of(result: Result, valid: Tensor) -> Tensor:
    return torch.where(valid, result.weights(), 0)


@examples(200)
@given(losses, coefficients, items)
def test_value_is_the_definition(ell: Tensor, w: dict[str, float], m: int | None) -> None:
    s = statistics(batch_of(ell, items=m))
    mean, std, z = oracle.statistics(ell)
    torch.testing.assert_close(s.mean, mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(s.std, std, rtol=1e-9, atol=0)
    torch.testing.assert_close(s.dispersion, z.abs().mean(), rtol=1e-6, atol=1e-9)
    assert s.max == ell.max()
    assert s.max_index == int(ell.argmax())
    torch.testing.assert_close(
        NVAMP(**w).evaluate(batch_of(ell, items=m)).loss,
        oracle.nvamp(ell, **w, items=m),
        rtol=1e-6,
        atol=1e-9,
    )


@examples(300)
@given(losses, coefficients, items, st.sampled_from(GRADIENTS))
def test_weights_are_the_derivative(
    ell: Tensor, w: dict[str, float], m: int | None, gradient: Gradient
) -> None:
    mean = ell.mean()
    assume(gradient != "full" or ((ell - mean).abs() > 1e-6).all())  # |ℓ − μ| has a kink there
    x = ell.clone().requires_grad_()
    (expected,) = torch.autograd.grad(oracle.surrogate(x, gradient, **w, items=m), x)
    got = token_weights(NVAMP(**w, gradient=gradient), ell, num_items_in_batch=m)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_first_of_equal_maxima_gets_the_penalty(gradient: Gradient) -> None:
    ell = torch.tensor([1.0, 5.0, 2.0, 5.0], dtype=torch.float64)
    with_penalty = token_weights(NVAMP(0, 0.5, 3.0, gradient=gradient), ell)
    without = token_weights(NVAMP(0, 0.5, 0.0, gradient=gradient), ell)
    penalty = 0.0 if gradient == "detached" else 3.0
    assert (with_penalty - without).tolist() == [0, penalty, 0, 0]


@examples(50)
@given(losses, coefficients, items)
def test_token_mode_spends_what_scalar_mode_spends(ell: Tensor, w: dict[str, float], m: int | None) -> None:
    totals = [
        token_weights(NVAMP(**w, gradient=gradient), ell, num_items_in_batch=m).sum()
        for gradient in ("scalar", "token")
    ]
    torch.testing.assert_close(*totals, rtol=1e-9, atol=1e-12)


@examples(100)
@given(losses, st.data(), st.sampled_from(GRADIENTS))
def test_invalid_tokens_change_nothing(ell: Tensor, data: st.DataObject, gradient: Gradient) -> None:
    """The weights among other tokens, whatever their losses, are those without them."""
    junk = st.sampled_from([0.0, 7.0, 1e30, math.inf, math.nan])
    mixed: list[float] = []
    valid: list[bool] = []
    for value in ell.tolist():
        for _ in range(data.draw(st.integers(0, 2))):
            mixed.append(data.draw(junk))
            valid.append(False)
        mixed.append(value)
        valid.append(True)
    mask, objective = torch.tensor(valid), NVAMP(gradient=gradient)
    got = token_weights(objective, torch.tensor(mixed, dtype=torch.float64), mask)
    assert (got[~mask] == 0).all()
    torch.testing.assert_close(got[mask], token_weights(objective, ell), rtol=1e-9, atol=1e-12)


@examples(50)
@given(st.lists(losses, min_size=1, max_size=5), st.sampled_from([0.02, 1.0]), st.sampled_from([0.0, 0.5]))
def test_cross_entropy_and_max_add_up_over_micro_batches(
    batches: list[Tensor], beta: float, gamma: float
) -> None:
    """Σ of the micro-batches = β·(mean over all tokens) + γ·(token-weighted mean of their maxima)."""
    m = sum(len(ell) for ell in batches)
    total = sum(NVAMP(0, beta, gamma).evaluate(batch_of(ell, items=m)).loss for ell in batches)
    expected = sum(beta * ell.sum() / m + gamma * ell.max() * len(ell) / m for ell in batches)
    torch.testing.assert_close(total, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_statistics_are_there_without_alpha(alpha: float, gradient: Gradient) -> None:
    """The loss then needs neither mean nor deviation."""
    ell = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    found = NVAMP(alpha, eps=0.5, gradient=gradient).evaluate(batch_of(ell)).statistics
    assert found is not None
    mean, std, z = oracle.statistics(ell, 0.5)
    torch.testing.assert_close(found()[4:7], (mean, std, z.abs().mean()))


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("count", [0, 3])
def test_no_valid_token(gradient: Gradient, count: int) -> None:
    ell, valid = torch.zeros(count), torch.zeros(count, dtype=torch.bool)
    assert statistics(batch_of(ell, valid)).max_index == -1
    result = NVAMP(gradient=gradient).evaluate(batch_of(ell, valid))
    assert result.loss == 0
    assert (weights_of(result, valid) == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [1, 2, 3, 1000])
@pytest.mark.parametrize("loss", [0.0, 7.6246189861593985, 1e-3, 12345.678])
def test_equal_losses_have_no_dispersion(dtype: torch.dtype, count: int, loss: float) -> None:
    ell = torch.full((count,), loss, dtype=dtype)
    assert statistics(batch_of(ell)).dispersion == 0
    for gradient in GRADIENTS:
        assert torch.isfinite(token_weights(NVAMP(gradient=gradient), ell)).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_nan_and_infinity_are_not_hidden(bad: float, gradient: Gradient) -> None:
    ell = torch.tensor([1.0, bad, 2.0])
    result = NVAMP(gradient=gradient).evaluate(batch_of(ell))
    assert result.loss.isnan()
    assert result.weights().isnan().all()


# Squares of all of these are beyond float32; so is the sum of some, and the difference of others.
HUGE_LOSSES = {
    "a masked label": [1.0, 2.0, 3.4028e38, 0.5],
    "several": [1.0, 3.4e38, 3e38, 9e36, 3.3e38, 7.0],
    "just beyond": [2.5, 2e19, 1.0, 7.0],
    "equal": [3e38] * 5,
    "around the limit": [2e12, 1e12, 1.5e12, 7e12, 7.0],
    "of both signs": [-3.4e38, 3.4e38, 1e38, 7.0],
}


@pytest.mark.parametrize("m", [None, 9])
@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("name", HUGE_LOSSES)
def test_huge_losses(name: str, gradient: Gradient, m: int | None) -> None:
    """As label classes masked with the smallest logit have."""
    ell, objective = torch.tensor(HUGE_LOSSES[name]), NVAMP(gradient=gradient)
    got, expected = (objective.evaluate(batch_of(x, items=m)) for x in (ell, ell.double()))
    within = {"rtol": 4e-7, "atol": 0.0, "check_dtype": False}
    torch.testing.assert_close(got.loss, expected.loss, **within)
    torch.testing.assert_close(
        got.weights() + 0 * ell, expected.weights() + 0 * ell, rtol=1e-6, atol=1e-9, check_dtype=False
    )
    x = ell.double().requires_grad_()
    (by_autograd,) = torch.autograd.grad(oracle.surrogate(x, gradient, **WEIGHTS, items=m), x)
    if name != "equal":  # where |ℓ − μ| has a kink
        torch.testing.assert_close(
            token_weights(objective, ell, num_items_in_batch=m),
            by_autograd,
            rtol=1e-6,
            atol=1e-9,
            check_dtype=False,
        )


@pytest.mark.parametrize("m", [5, 5.0, torch.tensor(5), torch.tensor([5], dtype=torch.int32).reshape(())])
def test_number_of_items_may_be_a_number_or_a_tensor(m: Tensor | float) -> None:
    ell = torch.tensor([1.0, 2.0, 4.0])
    s = statistics(batch_of(ell, items=m))
    torch.testing.assert_close(s.cross_entropy, torch.tensor(7 / 5))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_weights_of_half_precision_losses_are_summed_in_float32(dtype: torch.dtype) -> None:
    """Their number is beyond float16, and beyond what bfloat16 tells apart."""
    ell = torch.rand(100_001, generator=torch.Generator().manual_seed(0)).to(dtype)
    got = token_weights(NVAMP(), ell)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), token_weights(NVAMP(), ell.double()), rtol=1e-5, atol=0)


def test_weights_have_no_graph() -> None:
    assert not token_weights(NVAMP(gradient="full"), torch.rand(5, requires_grad=True)).requires_grad


def test_an_empty_step_divides_by_nothing() -> None:
    ell = torch.zeros(2)
    for items in (0, 0.0, torch.tensor(0)):
        assert NVAMP().evaluate(batch_of(ell, torch.zeros(2, dtype=torch.bool), items)).loss == 0


@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
def test_compiled_for_a_number_of_tokens_that_the_data_decide() -> None:
    criterion = TokenNVAMPLoss(2.0, gradient="full")

    def loss(ell: Tensor, valid: Tensor) -> Tensor:
        return criterion(ell[valid])

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for valid in ([True, False, True, True], [False] * 4):
        ell, mask = torch.tensor([1.0, 2.0, 4.0, 8.0]), torch.tensor(valid)
        torch.testing.assert_close(compiled(ell, mask), loss(ell, mask))


def test_a_loss_may_be_changed_in_place() -> None:
    """As `loss /= steps` does, before the backward."""
    ell = torch.tensor([1.0, 2.0, 4.0], requires_grad=True)
    (expected,) = torch.autograd.grad(TokenNVAMPLoss()(ell), ell)
    loss = TokenNVAMPLoss()(ell)
    loss /= 4
    torch.testing.assert_close(torch.autograd.grad(loss, ell)[0], expected / 4)


@pytest.mark.parametrize("tail", [0.0, 4e-10, 1e-9, 0.3])
def test_a_tail_is_never_empty(tail: float) -> None:
    assert NVAMP(0, 0, 1, tail=tail).evaluate(batch_of(torch.tensor([1.0, 5.0, 2.0]))).loss == 5
