"""NVAMP as one kernel, against what its operations of PyTorch give."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from nvamp import TokenNVAMPLoss, fused
from nvamp.engine import backends, triton
from nvamp.functional import token_weights
from nvamp.objectives import GRADIENTS, NVAMP, Batch, Focal, Gradient, Result
from nvamp.objectives.statistics import statistics
from nvamp.ranks import ALONE, Ranks
from tests import oracle
from tests.engine.test_triton import run
from tests.objectives.test_nvamp import HUGE_LOSSES, coefficients, weights_of
from tests.strategies import examples

PUBLISHED = NVAMP()
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


def all_valid(ell: Tensor) -> Tensor:
    return torch.ones_like(ell, dtype=torch.bool)


def by_kernel(
    ell: Tensor, valid: Tensor, items: Tensor | float | None = None, objective: NVAMP = PUBLISHED
) -> Result:
    """The result of a program that takes 32 losses at a time, or 16 in float64."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "BLOCK_BYTES", 128)
        return fused.evaluate(objective, ell, valid, items, ignore_index=0)


def by_definition(
    ell: Tensor, valid: Tensor, items: Tensor | float | None = None, objective: NVAMP = PUBLISHED
) -> Result:
    batch = Batch(ell.masked_fill(~valid, 0), valid, items)
    return objective.evaluate(batch)._replace(statistics=lambda: statistics(batch, objective.eps))


def assert_same(
    got: Result, expected: Result, valid: Tensor, kinks: bool = False, rtol: float = 1e-9
) -> None:
    """With `kinks` some loss is so near the mean that its sign is a matter of rounding."""

    def compare(name: str, a: Tensor, b: Tensor | float) -> None:
        b = torch.as_tensor(b, dtype=a.dtype)
        torch.testing.assert_close(a, b, rtol=rtol, atol=1e-12, equal_nan=True, msg=lambda m: f"{name}: {m}")

    compare("loss", got.loss, expected.loss)
    assert got.statistics is not None
    assert expected.statistics is not None
    for name, a, b in zip(got.statistics()._fields, got.statistics(), expected.statistics(), strict=True):
        if name != "mean_sign" or not kinks:
            compare(name, a, b)
    if not kinks:
        compare("weights", weights_of(got, valid), weights_of(expected, valid))
        for part in ("shared", "per_token"):
            a, b = getattr(got, part), getattr(expected, part)
            assert (a is None) == (b is None), part
            if a is not None and valid.any():
                compare(part, torch.where(valid, a, 0), torch.where(valid, b, 0))


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
    arguments = (*batch, m, NVAMP(**w, gradient=gradient, eps=eps))
    if any(w.values()):  # else the mode makes no difference to the definition
        assert_same(by_kernel(*arguments), by_definition(*arguments), batch[1], has_kinks(*batch))


@pytest.mark.parametrize(
    "gap", [1, 16, 33]
)  # within a block of 16, in the same lane of the next one, and in another
def test_kernel_takes_the_first_of_equal_losses(gap: int) -> None:
    ell = torch.ones(64, dtype=torch.float64)
    ell[[3, 3 + gap]] = 5.0
    arguments = (ell, all_valid(ell), None, NVAMP(gamma=0.5))
    assert_same(by_kernel(*arguments), by_definition(*arguments), all_valid(ell))


@pytest.mark.parametrize("labels", [torch.int64, torch.int32])
@pytest.mark.parametrize("ignore_index", [-100, 0, 2**31 - 1])
def test_kernel_reads_labels(labels: torch.dtype, ignore_index: int) -> None:
    ell = torch.tensor([math.nan, 1.0, 4.0, math.inf, 2.0])
    y = torch.tensor([ignore_index, 5, -1, ignore_index, 7], dtype=labels)
    objective, valid = NVAMP(gradient="token"), y != ignore_index
    got = fused.evaluate(objective, ell, y, None, ignore_index=ignore_index)
    assert_same(got, by_definition(ell, valid, objective=objective), valid, rtol=1e-6)


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
    for objective in (NVAMP(gradient=gradient), NVAMP(0.0, 1.0, 0.0, gradient=gradient)):
        got = by_kernel(x, valid, objective=objective)
        assert got.loss.isnan()
        assert weights_of(got, valid).isnan().all()
        assert got.statistics is not None
        assert got.statistics().max_index == index
        assert torch.isnan(by_definition(x, valid, objective=objective).weights()).all()
        finite = x.isfinite()
        results = (of(x, finite, objective=objective) for of in (by_kernel, by_definition))
        if objective.alpha:
            assert_same(*results, finite, has_kinks(x, finite), rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [1, 2, 3, 1000])
@pytest.mark.parametrize("loss", [0.0, 7.6246189861593985, 1e-3, 12345.678])
def test_kernel_sees_no_dispersion_in_equal_losses(dtype: torch.dtype, count: int, loss: float) -> None:
    ell = torch.full((count,), loss, dtype=dtype)
    for gradient in GRADIENTS:
        got = by_kernel(ell, all_valid(ell), objective=NVAMP(gradient=gradient))
        assert got.statistics is not None
        assert got.statistics().dispersion == 0
        assert torch.isfinite(got.weights()).all()


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("name", HUGE_LOSSES)
def test_kernel_takes_huge_losses(name: str, gradient: Gradient) -> None:
    ell = torch.tensor([*HUGE_LOSSES[name], math.inf])
    arguments: Any = (ell.isfinite(), 9, NVAMP(gradient=gradient))
    for x in (ell, ell.double()):
        assert_same(by_kernel(x, *arguments), by_definition(x, *arguments), arguments[0], rtol=1e-6)


LOSSES: dict[str, Callable[[int], Tensor]] = {
    "exponential": lambda n: torch.distributions.Exponential(1 / 3).sample((n,)),
    "heavy tail": lambda n: torch.distributions.LogNormal(0.0, 2.0).sample((n,)),
    "far from 0": lambda n: 1e4 + torch.rand(n),
    "alike": lambda n: 10 + 1e-3 * torch.randn(n),
}


def value_of(result: Result, name: str, valid: Tensor) -> Tensor:
    if name in ("loss", "weights"):
        return result.loss if name == "loss" else weights_of(result, valid)
    assert result.statistics is not None
    value: Tensor = getattr(result.statistics(), name)
    return value


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
        objective = NVAMP(gradient="token")
        truth, plain = (by_definition(x, valid, objective=objective) for x in (ell.double(), ell))
        kernel = fused.evaluate(objective, ell, valid, None, ignore_index=0)
        for name in ("loss", "weights", "cross_entropy", "mean", "std", "dispersion"):
            exact, *found = (value_of(r, name, valid) for r in (truth, plain, kernel))
            errors.setdefault(name, []).append(tuple(oracle.relative_error(x, exact) for x in found))  # type: ignore
    for name, pairs in errors.items():
        of_plain, of_kernel = map(max, zip(*pairs, strict=True))
        assert of_kernel <= max(1.5 * of_plain, 2e-7), name


class Derived(NVAMP):
    """Which may have another rule."""


def test_what_the_kernel_cannot_judge(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backends.OF_DEVICE, "cpu", ("triton",))
    ell = torch.ones(3)
    assert fused.serves(NVAMP(), ell, None, ALONE)
    assert not fused.serves(NVAMP(), ell, "chunked", ALONE)
    assert not fused.serves(NVAMP(), ell, None, Ranks(size=2))
    for objective in (NVAMP(tail=0.1), Derived(), Focal()):
        assert not fused.serves(objective, ell, None, ALONE)
    served = []
    torch.vmap(lambda x: (served.append(fused.serves(NVAMP(), x, None, ALONE)), x)[1])(ell[None])
    assert served == [False]


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_losses_of_one_gpu_are_judged_by_the_kernel(
    gradient: Gradient, monkeypatch: pytest.MonkeyPatch
) -> None:
    ell, valid = torch.tensor([1.0, math.nan, 2.0, 4.0, 4.0]), torch.tensor([True, False, True, True, True])

    def run() -> list[Tensor]:
        x = ell.clone().requires_grad_()
        criterion = TokenNVAMPLoss(gradient=gradient)
        loss, stats = criterion(x, valid, num_items_in_batch=7, return_stats=True)
        return [
            loss.detach(),
            *torch.autograd.grad(loss, x),
            *stats,
            token_weights(NVAMP(gradient=gradient), ell, valid),
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
def test_opcheck_of_the_kernel(gradient: Gradient, dtype: torch.dtype) -> None:
    ell, labels = torch.tensor([1.0, 4.0, 2.0], dtype=dtype), torch.tensor([0, 1, -100])
    for items in ((None, None), (torch.tensor(9), None), (None, 9.0)):
        for apart in (False, gradient in ("scalar", "detached")):
            arguments = (ell, labels, *items, -100, 1.0, 0.02, 0.001, 1e-6, gradient, apart)
            torch.library.opcheck(torch.ops.nvamp.objective.default, arguments)


@pytest.mark.parametrize("kind", [int, float, torch.tensor])
def test_other_numbers_of_items_compile_the_kernel_once_more_at_most(
    kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    monkeypatch.setitem(backends.OF_DEVICE, "cpu", ("triton",))
    counter = CompileCounterWithBackend("aot_eager")
    criterion = TokenNVAMPLoss()
    compiled = torch.compile(criterion, backend=counter, fullgraph=True)
    for i in range(5):
        ell = torch.rand(5 + i)
        got = compiled(ell, num_items_in_batch=kind(50 + i))
        torch.testing.assert_close(got, criterion(ell, num_items_in_batch=50 + i))
    assert counter.frame_count <= 2


def test_kernel_compiles_without_spills() -> None:
    """Nor does it compute in float64 what is to be float32: not every GPU can."""
    done = run(
        "import torch\n"
        "from itertools import product\n"
        "from benchmarks.kernels import compiling, machine_code\n"
        "from nvamp import fused\n"
        "from nvamp.objectives import GRADIENTS\n"
        "c = fused.Coefficients(1.0, 0.02, 0.001, 1e-6)\n"
        "m = torch.empty((), dtype=torch.int64, device='meta')\n"
        "for architecture, dtype in product(('80', '90', '100', '120'), (torch.float32, torch.float64)):\n"
        "    nll = torch.empty(100, dtype=dtype, device='meta')\n"
        "    labels = torch.empty(100, dtype=torch.int64, device='meta')\n"
        "    cases = [(gradient, labels, None, None) for gradient in GRADIENTS]\n"
        "    cases += [('full', labels.bool(), m, None), ('full', labels.int(), None, 7.0)]\n"
        "    with compiling(architecture) as compiled:\n"
        "        for gradient, y, *items in cases:\n"
        "            fused.judge.function(nll, y, *items, -100, c, gradient, gradient in ('scalar', 'detached'))\n"
        "    codes = [machine_code(binary) for binary, _ in compiled]\n"
        "    print(len(codes), max(c.local_bytes for c in codes), any(c.has_float64 for c in codes))\n"
    )
    assert done.stdout.split() == ["6", "0", "False", "6", "0", "True"] * 4, done.stderr
