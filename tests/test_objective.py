"""The objective on per-token losses, against float64 autograd of its definition."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from nvamp.objective import GRADIENTS, Gradient, Result
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from nvamp import fused, objective
from nvamp.engine import backends, triton
from nvamp.functional import token_nvamp_loss, token_weights
from nvamp.ranks import ALONE
from tests import oracle
from tests.engine.test_triton import run
from tests.strategies import examples

WEIGHTS = {"alpha": 1.0, "beta": 0.02, "gamma": 0.001}

losses = st.lists(st.floats(0, 20, width=32), min_size=1, max_size=40).map(
    lambda values: torch.tensor(values, dtype=torch.float64)
)
coefficients = st.fixed_dictionaries(
    {name: st.sampled_from([0.0, 0.001, 0.02, 1.0, 3.0]) for name in WEIGHTS}
)
items = st.none() | st.integers(1, 100)


def all_valid(ell: Tensor) -> Tensor:
    return torch.ones_like(ell, dtype=torch.bool)


@examples(200)
@given(losses, coefficients, items)
def test_value_is_the_definition(ell: Tensor, w: dict[str, float], m: int | None) -> None:
    s = objective.statistics(ell, all_valid(ell), m)
    mean, std, z = oracle.statistics(ell)
    torch.testing.assert_close(s.mean, mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(s.std, std, rtol=1e-9, atol=0)
    torch.testing.assert_close(s.dispersion, z.abs().mean(), rtol=1e-6, atol=1e-9)
    assert s.max == ell.max()
    assert s.max_index == int(ell.argmax())
    torch.testing.assert_close(objective.value(s, **w), oracle.nvamp(ell, **w, items=m), rtol=1e-6, atol=1e-9)


@examples(300)
@given(losses, coefficients, items, st.sampled_from(GRADIENTS))
def test_weights_are_the_derivative(
    ell: Tensor, w: dict[str, float], m: int | None, gradient: Gradient
) -> None:
    mean = ell.mean()
    assume(gradient != "full" or ((ell - mean).abs() > 1e-6).all())  # |ℓ − μ| has a kink there
    x = ell.clone().requires_grad_()
    (expected,) = torch.autograd.grad(oracle.surrogate(x, gradient, **w, items=m), x)
    got = token_weights(ell, num_items_in_batch=m, **w, gradient=gradient)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_first_of_equal_maxima_gets_the_penalty(gradient: Gradient) -> None:
    ell = torch.tensor([1.0, 5.0, 2.0, 5.0], dtype=torch.float64)
    with_penalty = token_weights(ell, alpha=0, beta=0.5, gamma=3.0, gradient=gradient)
    without = token_weights(ell, alpha=0, beta=0.5, gamma=0.0, gradient=gradient)
    penalty = 0.0 if gradient == "detached" else 3.0
    assert (with_penalty - without).tolist() == [0, penalty, 0, 0]


@examples(50)
@given(losses, coefficients, items)
def test_token_mode_spends_what_scalar_mode_spends(ell: Tensor, w: dict[str, float], m: int | None) -> None:
    totals = [
        token_weights(ell, num_items_in_batch=m, **w, gradient=gradient).sum()
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
    mask = torch.tensor(valid)
    got = token_weights(torch.tensor(mixed, dtype=torch.float64), mask, gradient=gradient)
    assert (got[~mask] == 0).all()
    torch.testing.assert_close(got[mask], token_weights(ell, gradient=gradient), rtol=1e-9, atol=1e-12)


@examples(50)
@given(st.lists(losses, min_size=1, max_size=5), st.sampled_from([0.02, 1.0]), st.sampled_from([0.0, 0.5]))
def test_cross_entropy_and_max_add_up_over_micro_batches(
    batches: list[Tensor], beta: float, gamma: float
) -> None:
    """Σ of the micro-batches = β·(mean over all tokens) + γ·(token-weighted mean of their maxima)."""
    m = sum(len(ell) for ell in batches)
    total = sum(
        objective.value(objective.statistics(ell, all_valid(ell), m), alpha=0, beta=beta, gamma=gamma)
        for ell in batches
    )
    expected = sum(beta * ell.sum() / m + gamma * ell.max() * len(ell) / m for ell in batches)
    torch.testing.assert_close(total, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("count", [0, 3])
def test_no_valid_token(gradient: Gradient, count: int) -> None:
    ell, valid = torch.zeros(count), torch.zeros(count, dtype=torch.bool)
    s = objective.statistics(ell, valid)
    assert objective.value(s, **WEIGHTS) == 0
    assert s.max_index == -1
    assert (objective.weights(ell, valid, s, **WEIGHTS, gradient=gradient) == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [1, 2, 3, 1000])
@pytest.mark.parametrize("loss", [0.0, 7.6246189861593985, 1e-3, 12345.678])
def test_equal_losses_have_no_dispersion(dtype: torch.dtype, count: int, loss: float) -> None:
    ell = torch.full((count,), loss, dtype=dtype)
    s = objective.statistics(ell, all_valid(ell))
    assert s.dispersion == 0
    for gradient in GRADIENTS:
        w = objective.weights(ell, all_valid(ell), s, **WEIGHTS, gradient=gradient)
        assert torch.isfinite(w).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_nan_and_infinity_are_not_hidden(bad: float, gradient: Gradient) -> None:
    ell = torch.tensor([1.0, bad, 2.0])
    s = objective.statistics(ell, all_valid(ell))
    assert objective.value(s, **WEIGHTS).isnan()
    assert objective.weights(ell, all_valid(ell), s, **WEIGHTS, gradient=gradient).isnan().all()


@pytest.mark.parametrize("m", [5, 5.0, torch.tensor(5), torch.tensor([5], dtype=torch.int32).reshape(())])
def test_number_of_items_may_be_a_number_or_a_tensor(m: Tensor | float) -> None:
    ell = torch.tensor([1.0, 2.0, 4.0])
    s = objective.statistics(ell, all_valid(ell), m)
    torch.testing.assert_close(s.cross_entropy, torch.tensor(7 / 5))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_weights_of_half_precision_losses_are_summed_in_float32(dtype: torch.dtype) -> None:
    """Their number is beyond float16, and beyond what bfloat16 tells apart."""
    ell = torch.rand(100_001, generator=torch.Generator().manual_seed(0)).to(dtype)
    got = token_weights(ell)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), token_weights(ell.double()), rtol=1e-5, atol=0)


def test_an_empty_step_divides_by_nothing() -> None:
    ell = torch.zeros(2)
    s = objective.statistics(ell, torch.zeros(2, dtype=torch.bool), torch.tensor(0))
    assert objective.value(s, **WEIGHTS) == 0


@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
def test_compiled_for_a_number_of_tokens_that_the_data_decide() -> None:
    def loss(ell: Tensor, valid: Tensor) -> Tensor:
        return token_nvamp_loss(ell[valid], alpha=2.0, gradient="full")

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for valid in ([True, False, True, True], [False] * 4):
        ell, mask = torch.tensor([1.0, 2.0, 4.0, 8.0]), torch.tensor(valid)
        torch.testing.assert_close(compiled(ell, mask), loss(ell, mask))


# As one kernel ------------------------------------------------------------------------------------------

JUNK = st.sampled_from([0.0, 7.0, 1e30, math.inf, math.nan])
ITEMS = st.none() | st.sampled_from(
    [3, 7.5, 0, torch.tensor(9), torch.tensor(2.5), torch.tensor(0), torch.tensor(9, dtype=torch.int32)]
)
# Of few different numbers, so that there are ties.
NUMBERS = st.sampled_from([0.0, 0.125, 3.0, 3.0 + 2**-20, 11.7]) | st.floats(0, 20, width=32)


@st.composite
def batches(draw: st.DrawFn, offset: float = 0.0, junk: bool = True) -> tuple[Tensor, Tensor]:
    """Losses [tokens] in float64 and where they count; elsewhere they may be anything."""
    count = st.sampled_from([0, 1, 2, 7, 31, 32, 33, 100])
    valid = draw(st.lists(st.booleans(), min_size=(n := draw(count)), max_size=n))
    if draw(st.booleans()):
        valid = [draw(st.booleans())] * n
    ell = [offset + draw(NUMBERS) if counts or not junk else draw(JUNK) for counts in valid]
    return torch.tensor(ell, dtype=torch.float64), torch.tensor(valid, dtype=torch.bool)


def by_kernel(
    ell: Tensor,
    valid: Tensor,
    items: Tensor | float | None = None,
    w: dict[str, float] = WEIGHTS,
    gradient: Gradient = "scalar",
    eps: float = 1e-6,
    per_token: bool = True,
) -> Result:
    """The result of a program that takes 32 losses at a time, or 16 in float64."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "BLOCK_BYTES", 128)
        return fused.evaluate(
            ell, valid, items, ignore_index=0, **w, eps=eps, gradient=gradient, per_token=per_token
        )


def by_definition(
    ell: Tensor,
    valid: Tensor,
    items: Tensor | float | None = None,
    w: dict[str, float] = WEIGHTS,
    gradient: Gradient = "scalar",
    eps: float = 1e-6,
    per_token: bool = True,
) -> Result:
    known = ell.masked_fill(~valid, 0)
    return objective.evaluate(
        known,
        valid,
        items,
        **w,
        eps=eps,
        gradient=gradient,
        ranks=ALONE,
        per_token=per_token,
        all_moments=True,
    )


def assert_same(got: Result, expected: Result, kinks: bool = False, rtol: float = 1e-9) -> None:
    """With `kinks` some loss is so near the mean that its sign is a matter of rounding."""

    def compare(name: str, a: Tensor, b: Tensor | float) -> None:
        b = torch.as_tensor(b, dtype=a.dtype)
        torch.testing.assert_close(a, b, rtol=rtol, atol=1e-12, equal_nan=True, msg=lambda m: f"{name}: {m}")

    compare("loss", got.loss, expected.loss)
    for name, a, b in zip(got.statistics()._fields, got.statistics(), expected.statistics(), strict=True):
        if name != "mean_sign" or not kinks:
            compare(name, a, b)
    if not kinks:
        compare("weights", got.weights, expected.weights)


def has_kinks(ell: Tensor, valid: Tensor) -> bool:
    distance = (ell - ell[valid].mean()).abs()[valid]
    return bool((distance < 1e-9).any() and (distance > 0).any())


@examples(300)
@given(batches(), ITEMS, coefficients, st.sampled_from(GRADIENTS), st.sampled_from([1e-6, 0.5]))
def test_kernel_is_the_definition(
    batch: tuple[Tensor, Tensor],
    m: Tensor | float | None,
    w: dict[str, float],
    gradient: Gradient,
    eps: float,
) -> None:
    arguments = (*batch, m, w, gradient, eps)
    assert_same(by_kernel(*arguments), by_definition(*arguments), has_kinks(*batch))


@examples(50)
@given(batches(), ITEMS, coefficients, st.sampled_from(["scalar", "detached"]))
def test_kernel_gives_the_weights_of_sum_and_maximum(
    batch: tuple[Tensor, Tensor], m: Tensor | float | None, w: dict[str, float], gradient: Gradient
) -> None:
    got, expected = (f(*batch, m, w, gradient, per_token=False) for f in (by_kernel, by_definition))
    torch.testing.assert_close(got.weights, expected.weights, equal_nan=True)
    assert (got.at_max is None) == (expected.at_max is None)
    if got.at_max is not None and batch[1].any():
        torch.testing.assert_close(got.at_max, expected.at_max, equal_nan=True)


@pytest.mark.parametrize("labels", [torch.int64, torch.int32])
@pytest.mark.parametrize("ignore_index", [-100, 0, 2**31 - 1])
def test_kernel_reads_labels(labels: torch.dtype, ignore_index: int) -> None:
    ell = torch.tensor([math.nan, 1.0, 4.0, math.inf, 2.0])
    y = torch.tensor([ignore_index, 5, -1, ignore_index, 7], dtype=labels)
    got = fused.evaluate(
        ell, y, None, ignore_index=ignore_index, **WEIGHTS, eps=1e-6, gradient="token", per_token=True
    )
    assert_same(got, by_definition(ell, y != ignore_index, gradient="token"), rtol=1e-6)


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize(
    ("ell", "index"),
    [
        ([1.0, math.nan, 5.0, math.nan], 1),
        ([1.0, math.inf, 5.0, math.inf], 1),
        ([math.inf, 1.0, math.nan, 5.0], 2),
        ([0.0] * 40 + [math.nan], 40),
        ([math.nan] + [0.0] * 40, 0),
        ([7.0] + [0.0] * 40 + [math.nan] + [0.0] * 20 + [math.inf, math.nan], 41),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_kernel_hides_no_nan(ell: list[float], index: int, dtype: torch.dtype, gradient: Gradient) -> None:
    """One that counts makes everything NaN, and the first is the largest; one that does not is nothing."""
    x = torch.tensor(ell, dtype=dtype)
    valid = torch.ones_like(x, dtype=torch.bool)
    for w in (WEIGHTS, {"alpha": 0.0, "beta": 1.0, "gamma": 0.0}):
        got = by_kernel(x, valid, w=w, gradient=gradient)
        assert got.loss.isnan()
        assert got.weights.isnan().all()
        assert got.statistics().max_index == index
        assert_same(got, by_definition(x, valid, w=w, gradient=gradient))
        assert_same(
            by_kernel(x, x.isfinite(), w=w, gradient=gradient),
            by_definition(x, x.isfinite(), w=w, gradient=gradient),
            has_kinks(x, x.isfinite()),
            rtol=1e-6,
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [1, 2, 3, 1000])
@pytest.mark.parametrize("loss", [0.0, 7.6246189861593985, 1e-3, 12345.678])
def test_kernel_sees_no_dispersion_in_equal_losses(dtype: torch.dtype, count: int, loss: float) -> None:
    ell = torch.full((count,), loss, dtype=dtype)
    for gradient in GRADIENTS:
        got = by_kernel(ell, all_valid(ell), gradient=gradient)
        assert got.statistics().dispersion == 0
        assert torch.isfinite(got.weights).all()


LOSSES: dict[str, Callable[[int], Tensor]] = {
    "exponential": lambda n: torch.distributions.Exponential(1 / 3).sample((n,)),
    "heavy tail": lambda n: torch.distributions.LogNormal(0.0, 2.0).sample((n,)),
    "far from 0": lambda n: 1e4 + torch.rand(n),
    "alike": lambda n: 10 + 1e-3 * torch.randn(n),
}


@pytest.mark.parametrize("losses_of", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("count", [1000, 8192, 40_001])
def test_kernel_is_as_exact_in_float32_as_operations_of_pytorch(
    losses_of: Callable[[int], Tensor], count: int
) -> None:
    """Errors to float64, of all there is but signs about the mean; largest of ten batches."""
    errors: dict[str, list[tuple[float, float]]] = {}
    for seed in range(10):
        torch.manual_seed(seed)
        ell, valid = losses_of(count), torch.rand(count) > 0.1
        truth, plain = (by_definition(x, valid, gradient="token") for x in (ell.double(), ell))
        kernel = fused.evaluate(
            ell, valid, None, ignore_index=0, **WEIGHTS, eps=1e-6, gradient="token", per_token=True
        )
        for name in ("loss", "weights", "cross_entropy", "mean", "std", "dispersion"):
            exact, *found = (
                getattr(r, name, getattr(r.statistics(), name, None)) for r in (truth, plain, kernel)
            )
            errors.setdefault(name, []).append(tuple(oracle.relative_error(x, exact) for x in found))  # type: ignore
    for name, pairs in errors.items():
        of_plain, of_kernel = map(max, zip(*pairs, strict=True))
        assert of_kernel <= max(1.5 * of_plain, 2e-7), name


def test_a_loss_may_be_changed_in_place() -> None:
    """As `loss /= steps` does, before the backward."""
    ell = torch.tensor([1.0, 2.0, 4.0], requires_grad=True)
    (expected,) = torch.autograd.grad(token_nvamp_loss(ell), ell)
    loss = token_nvamp_loss(ell)
    loss /= 4
    torch.testing.assert_close(torch.autograd.grad(loss, ell)[0], expected / 4)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_losses_of_one_gpu_are_judged_by_the_kernel(
    gradient: Gradient, monkeypatch: pytest.MonkeyPatch
) -> None:
    ell, valid = torch.tensor([1.0, math.nan, 2.0, 4.0, 4.0]), torch.tensor([True, False, True, True, True])

    def run() -> list[Tensor]:
        x = ell.clone().requires_grad_()
        loss, stats = token_nvamp_loss(x, valid, gradient=gradient, num_items_in_batch=7, return_stats=True)
        return [
            loss.detach(),
            *torch.autograd.grad(loss, x),
            *stats,
            token_weights(ell, valid, gradient=gradient),
        ]

    expected = run()
    monkeypatch.setitem(backends.OF_DEVICE, "cpu", ("triton",))
    calls = []
    launch = triton.launch
    monkeypatch.setattr(
        triton, "launch", lambda *args, **constants: (calls.append(1), launch(*args, **constants))
    )
    torch.testing.assert_close(run(), expected)
    assert len(calls) == 2


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("per_token", [True, False])
def test_opcheck_of_the_kernel(gradient: Gradient, dtype: torch.dtype, per_token: bool) -> None:
    ell, labels = torch.tensor([1.0, 4.0, 2.0], dtype=dtype), torch.tensor([0, 1, -100])
    for items in ((None, None), (torch.tensor(9), None), (None, 9.0)):
        arguments = (ell, labels, *items, -100, 1.0, 0.02, 0.001, 1e-6, gradient, per_token)
        torch.library.opcheck(torch.ops.nvamp.objective.default, arguments)


@pytest.mark.parametrize("kind", [int, float, torch.tensor])
def test_other_numbers_of_items_compile_the_kernel_once_more_at_most(
    kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    monkeypatch.setitem(backends.OF_DEVICE, "cpu", ("triton",))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(token_nvamp_loss, backend=counter, fullgraph=True)
    for i in range(5):
        ell = torch.rand(5 + i)
        got = compiled(ell, num_items_in_batch=kind(50 + i))
        torch.testing.assert_close(got, token_nvamp_loss(ell, num_items_in_batch=50 + i))
    assert counter.frame_count <= 2


@pytest.mark.parametrize("architecture", ["80", "90", "100", "120"])
def test_kernel_compiles_without_spills(architecture: str) -> None:
    """Nor does it compute in float64 what is to be float32: not every GPU can."""
    done = run(
        "import torch\n"
        "from benchmarks.kernels import compiling, machine_code\n"
        "from nvamp import fused\n"
        "from nvamp.objective import GRADIENTS\n"
        "m = torch.empty((), dtype=torch.int64, device='meta')\n"
        "for dtype in (torch.float32, torch.float64):\n"
        "    nll = torch.empty(100, dtype=dtype, device='meta')\n"
        "    labels = torch.empty(100, dtype=torch.int64, device='meta')\n"
        "    cases = [(gradient, labels, None, None) for gradient in GRADIENTS]\n"
        "    cases += [('full', labels.bool(), m, None), ('full', labels.int(), None, 7.0)]\n"
        f"    with compiling({architecture!r}) as compiled:\n"
        "        for gradient, y, *items in cases:\n"
        "            fused.objective.function(nll, y, *items, -100, 1.0, 0.02, 0.001, 1e-6, gradient, True)\n"
        "    codes = [machine_code(binary) for binary, _ in compiled]\n"
        "    print(len(codes), max(c.local_bytes for c in codes), any(c.has_float64 for c in codes))\n"
    )
    assert done.stdout.split() == ["6", "0", "False", "6", "0", "True"], done.stderr
