"""The two primitives and the one-pass operator, against float64 autograd of the definition."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from nvamp.engine import backends, devices, linear, linear_nll_sum, triton
from nvamp.engine.options import Head, Needs, Options
from nvamp.functional import (
    linear_nvamp_loss,
    linear_token_nll,
    nvamp_loss,
    token_nll,
    token_weights,
)
from nvamp.objectives import NVAMP
from tests import oracle
from tests.engine.problems import (
    DTYPES,
    HALF,
    IGNORED,
    OPTIONS,
    Problem,
    assert_no_worse,
    gradients,
    layouts,
    make_problem,
    with_gradient,
)

BACKENDS = ["reference", "chunked", "triton"]
with_options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
with_fused = pytest.mark.parametrize("backend", BACKENDS[1:])  # those that "reference" is the oracle of
with_backend = pytest.mark.parametrize("backend", BACKENDS)
PATHS = ["chunked", "chunked, one pass", "triton", "triton, one pass"]
TIGHT = {"rtol": 1e-10, "atol": 1e-12}


@with_options
@with_backend
@pytest.mark.usefixtures("setting")
def test_token_nll(backend: str, options: dict[str, Any]) -> None:
    p = make_problem()
    _, (expected,) = gradients(lambda x: (p.token_weights * p.exact(x, **options)).sum(), p.logits)
    nll = token_nll(p.logits, p.labels, backend=backend, **options)
    torch.testing.assert_close(nll, p.exact(p.logits, **options), **TIGHT)
    _, (got,) = gradients(
        lambda x: (p.token_weights * token_nll(x, p.labels, backend=backend, **options)).sum(), p.logits
    )
    torch.testing.assert_close(got, expected, **TIGHT)
    assert (got[~p.valid] == 0).all()


@with_options
@with_backend
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.usefixtures("setting")
def test_linear_token_nll(backend: str, options: dict[str, Any], has_bias: bool) -> None:
    p = make_problem()
    inputs = (p.hidden, p.weight, p.bias)[: 2 + has_bias]

    def exact(h: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        return (p.token_weights * p.exact(torch.nn.functional.linear(h, w, b), **options)).sum()

    def ours(h: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        return (p.token_weights * linear_token_nll(h, w, p.labels, b, backend=backend, **options)).sum()

    value, expected = gradients(exact, *inputs)
    got_value, got = gradients(ours, *inputs)
    torch.testing.assert_close(got_value, value, **TIGHT)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, **TIGHT)


# How many rows have a weight of their own, and with which options; the largest of all is one that is kept.
FEW = [
    (few, name)
    for few, names in {0: ["plain"], 1: OPTIONS, 3: ["plain", "all"], 23: ["all"]}.items()
    for name in names
]
with_few = pytest.mark.parametrize("few", [0, 1, 3, 23])


def extra_weights(nll: Tensor, few: int, seed: int = 1) -> Tensor:
    """Of either sign, in the row of the largest loss or in any few rows, ignored ones too; 0 elsewhere."""
    g = torch.Generator().manual_seed(seed)
    rows = nll.detach().argmax()[None] if few == 1 else torch.randperm(len(nll), generator=g)[:few]
    weights = torch.randn(len(rows), generator=g, dtype=torch.float64) - 0.5
    return torch.zeros(len(nll), dtype=torch.float64).index_copy_(0, rows, weights)


@pytest.mark.parametrize(("few", "options"), FEW)
@with_fused
@pytest.mark.parametrize(("has_bias", "ignored"), [(True, 0.3), (False, 0.0), (True, 1.0)])
@pytest.mark.usefixtures("setting")
def test_one_pass(few: int, options: str, backend: str, has_bias: bool, ignored: float) -> None:
    p = make_problem(ignored=ignored)
    inputs = (p.hidden, p.weight, p.bias)[: 2 + has_bias]

    def exact_nll(h: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        return p.exact(torch.nn.functional.linear(h, w, b), **OPTIONS[options])

    extra = extra_weights(torch.where(p.valid, exact_nll(*inputs), -torch.inf), few)

    def exact(*head: Tensor) -> Tensor:
        nll = exact_nll(*head)
        return 0.3 * nll.sum() + (extra * nll).sum()

    def ours(h: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        total, nll = linear_nll_sum(h, w, p.labels, b, few=few, backend=backend, **OPTIONS[options])
        assert nll.requires_grad == (few > 0)
        torch.testing.assert_close(nll, exact_nll(h, w, b), **TIGHT)
        return 0.3 * total + (extra * nll).sum()

    value, expected = gradients(exact, *inputs)
    got_value, got = gradients(ours, *inputs)
    torch.testing.assert_close(got_value, value, **TIGHT)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, **TIGHT)


@with_few
@with_fused
@pytest.mark.usefixtures("device_kind")
def test_weights_of_a_few_losses_alone(few: int, backend: str) -> None:
    """Without the sum, or with one that weighs nothing."""
    p = make_problem()
    inputs = p.hidden, p.weight, p.bias
    extra = extra_weights(p.exact(p.logits), few)
    expected = gradients(lambda h, w, b: (extra * p.exact(h @ w.T + b)).sum(), *inputs)

    def of_losses(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return (extra * linear_nll_sum(h, w, p.labels, b, few=few, backend=backend)[1]).sum()

    def of_both(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        total, nll = linear_nll_sum(h, w, p.labels, b, few=few, backend=backend)
        return 0 * total + (extra * nll).sum()

    for loss in (of_losses, of_both) if few else (of_both,):
        torch.testing.assert_close(gradients(loss, *inputs), expected, **TIGHT)


@with_few
@with_fused
@pytest.mark.usefixtures("device_kind")
def test_a_few_rows_that_weigh_nothing_more(few: int, backend: str) -> None:
    p = make_problem()
    inputs = p.hidden, p.weight, p.bias
    expected = gradients(lambda h, w, b: 0.3 * p.exact(h @ w.T + b).sum(), *inputs)

    def loss(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        total, nll = linear_nll_sum(h, w, p.labels, b, few=few, backend=backend)
        return 0.3 * total + (0 * nll).sum()

    torch.testing.assert_close(gradients(loss, *inputs), expected, **TIGHT)


@with_few
@with_fused
@pytest.mark.usefixtures("device_kind", "unwritten_is_nan")
def test_no_rows_at_all(few: int, backend: str) -> None:
    p = make_problem(n=0)
    extra = torch.zeros(0, dtype=torch.float64)

    def loss(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        total, nll = linear_nll_sum(h, w, p.labels, b, few=few, backend=backend)
        return total + (extra * nll).sum()

    value, grads = gradients(loss, p.hidden, p.weight, p.bias)
    assert value == 0
    for grad, x in zip(grads, (p.hidden, p.weight, p.bias), strict=True):
        assert torch.equal(grad, torch.zeros_like(x))


@with_fused
@pytest.mark.usefixtures("setting")
def test_of_tied_losses_the_first_gets_the_gradient(backend: str) -> None:
    """Wherever blocks and chunks end: without hidden states all losses are log V to the bit."""
    p = make_problem()
    inputs = torch.zeros_like(p.hidden), p.weight, torch.zeros_like(p.bias)
    first = (torch.arange(len(p.labels)) == p.valid.nonzero()[0]).double()
    expected = gradients(lambda h, w, b: (first * p.exact(h @ w.T + b)).sum(), *inputs)

    def ours(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return (first * linear_nll_sum(h, w, p.labels, b, few=1, backend=backend)[1]).sum()

    torch.testing.assert_close(gradients(ours, *inputs), expected, **TIGHT)


@with_few
@with_fused
@pytest.mark.parametrize("where", ["hidden", "weight of all", "weight of one"])
@pytest.mark.usefixtures("device_kind")
@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")  # of the interpreter
def test_nan_comes_through(few: int, backend: str, where: str) -> None:
    p = make_problem(ignored=0)
    extra = extra_weights(p.exact(p.logits), few)
    row = int(extra.argmax()) if few else 7
    if where == "weight of one":
        extra[row] = torch.nan
    hidden = p.hidden.clone()
    if where == "hidden":
        hidden[row] = torch.nan

    def loss(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        total, nll = linear_nll_sum(h, w, p.labels, b, few=few, backend=backend)
        shared = torch.nan if where == "weight of all" else 0.3
        return shared * total + (extra * nll).sum()

    value, (by_hidden, *others) = gradients(loss, hidden, p.weight, p.bias)
    if few == 0 and where == "weight of one":  # there is no gradient by single losses
        return
    assert value.isnan()
    assert by_hidden[row].isnan().all()
    assert all(grad.isnan().all() for grad in others)


@with_few
@with_fused
def test_one_pass_waits_for_no_device(few: int, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors without data have nothing to look at, and shapes that follow from no data."""
    monkeypatch.setattr(devices, "can_look", lambda _: False)
    if backend == "triton":
        monkeypatch.setattr(triton, "launch", lambda *_, **__: None)
        monkeypatch.setattr(triton, "_alike", lambda *_: True)  # it looks at addresses
    p, opt, needs = make_problem(dtype=torch.bfloat16), Options(), Needs(True, True, True)
    with FakeTensorMode() as mode:
        head = Head(*map(mode.from_tensor, (p.hidden, p.weight, p.bias, p.labels)))
        engine = backends.load(backend)
        (nll,), units = linear.unit_gradients(engine, head, needs, few, False, None, opt)
        grads = linear.weighted_gradients(
            engine, nll.sum(), nll, units, head, needs, few, None, opt, in_place=True
        )
    assert [x.shape for x in grads] == [x.shape for x in head[:3]]
    assert {x.dtype for x in grads} == {torch.bfloat16}


@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias"])
@pytest.mark.parametrize(
    ("backend", "one_pass"),
    [("reference", False), ("chunked", False), ("chunked", True), ("triton", False), ("triton", True)],
)
def test_frozen_inputs_get_no_gradient(backend: str, frozen: str, one_pass: bool) -> None:
    p = make_problem()
    extra = extra_weights(p.exact(p.logits), 3)

    def grads(trained: set[str]) -> dict[str, Tensor]:
        leaves = {k: getattr(p, k).clone().requires_grad_(k in trained) for k in ("hidden", "weight", "bias")}
        args = leaves["hidden"], leaves["weight"], p.labels, leaves["bias"]
        if one_pass:
            total, nll = linear_nll_sum(*args, few=3, backend=backend)
            total = total + (extra * nll).sum()
        else:
            total = linear_token_nll(*args, backend=backend).sum()
        total.backward()
        assert all(leaves[k].grad is None for k in leaves.keys() - trained)
        return {k: leaves[k].grad for k in trained}  # type: ignore[misc]

    everything = grads({"hidden", "weight", "bias"})
    for name, grad in grads({"hidden", "weight", "bias"} - {frozen}).items():
        torch.testing.assert_close(grad, everything[name], **TIGHT)


# Accuracy ----------------------------------------------------------------------------------------------

# Both round in the same operations; where not the same to the bit, their errors scatter around each other. In
# Triton's interpreter NumPy's exp and log add theirs: a few units in the last place. `benchmarks/gpu` holds
# compiled kernels to 1.1.
NO_WORSE = {"chunked": 1.1, "triton": 1.25}
# The gradient of the weight in bfloat16, added up over chunks each of which is rounded: docs/engine.md.
NO_WORSE_OVER_CHUNKS = 1.8
# The one pass on a CPU, which holds gradients in bfloat16 until they are scaled: docs/engine.md.
NO_WORSE_HELD = 2.1


@with_fused
@pytest.mark.parametrize("dtype", DTYPES[:-1], ids=str)
@pytest.mark.parametrize(("spread", "softcap"), [(1, None), (6, None), (0.1, 4.0), (6, 4.0)])
@pytest.mark.usefixtures("rounding_to_nearest")
def test_logits_path_is_as_accurate_as_eager(
    backend: str, dtype: torch.dtype, spread: float, softcap: float | None
) -> None:
    n = 128 if backend == "chunked" else 64  # kernels are interpreted
    p = make_problem(n=n, d=32, v=1999, ignored=0)
    logits = (spread * p.logits / 3).to(dtype)
    weight = torch.full((n,), 1 / n)

    def ours(x: Tensor) -> Tensor:
        return token_nll(x, p.labels, softcap=softcap, backend=backend)

    def eager_nll(x: Tensor) -> Tensor:
        z = x.float() if softcap is None else softcap * torch.tanh(x.float() / softcap)
        return torch.nn.functional.cross_entropy(z, p.labels, reduction="none")

    truth = with_gradient(lambda x: p.exact(x, softcap=softcap), logits.double(), weight.double())
    got = with_gradient(ours, logits, weight)
    eager = with_gradient(eager_nll, logits, weight)
    assert_no_worse(got, eager, truth, NO_WORSE[backend])
    assert got[1].dtype == dtype


# Kernels are interpreted: fewer of them.
@pytest.mark.parametrize(
    ("backend", "chunk"),
    [("chunked", 16), ("chunked", 32), ("chunked", 128), ("triton", 16), ("triton", 64)],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("few", [0, 1, 13])
@pytest.mark.usefixtures("rounding_to_nearest")
def test_linear_path_is_as_accurate_as_eager(
    backend: str, few: int, dtype: torch.dtype, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "chunk_rows", lambda *_: chunk)
    n = 128 if backend == "chunked" else 64
    p = make_problem(n=n, d=64, v=1999, dtype=dtype, ignored=0)
    inputs = hidden, weight = p.hidden, p.weight / 4
    exact, eager = hidden.double() @ weight.double().T, (hidden @ weight.T).float()
    no_worse = NO_WORSE[backend]
    nll = linear_token_nll(hidden, weight, p.labels, backend=backend)
    eager_nll = torch.nn.functional.cross_entropy(eager, p.labels, reduction="none")
    error = oracle.relative_error(nll, p.exact(exact))
    assert error <= no_worse * oracle.relative_error(eager_nll, p.exact(exact))

    extra = (extra_weights(p.exact(exact), few) if few else torch.zeros(n)).to(nll.dtype)

    def in_one_pass(h: Tensor, w: Tensor) -> Tensor:
        total, nll = linear_nll_sum(h, w, p.labels, few=few, backend=backend)
        return total + (extra * nll).sum()

    paths: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "exact": lambda h, w: ((1 + extra) * p.exact(h.double() @ w.double().T)).sum(),
        "eager": lambda h, w: (
            (1 + extra) * torch.nn.functional.cross_entropy((h @ w.T).float(), p.labels, reduction="none")
        ).sum(),
        "recompute": lambda h, w: ((1 + extra) * linear_token_nll(h, w, p.labels, backend=backend)).sum(),
        "one pass": in_one_pass,
    }
    scales = torch.linspace(1.03, 1.97, 11 if backend == "chunked" else 1) / n
    found = {name: scaled_gradients(loss, inputs, scales) for name, loss in paths.items()}
    half = dtype == torch.bfloat16
    for i, of in enumerate(("hidden", "weight")):
        errors = {name: oracle.relative_error(g[i], found["exact"][i]) for name, g in found.items()}
        over_chunks = NO_WORSE_OVER_CHUNKS if half and of == "weight" and chunk < n else 0
        assert errors["recompute"] <= max(no_worse, over_chunks) * errors["eager"], of
        assert errors["one pass"] <= max(no_worse, over_chunks, half * NO_WORSE_HELD) * errors["eager"], of


def scaled_gradients(
    loss: Callable[[Tensor, Tensor], Tensor], inputs: tuple[Tensor, Tensor], scales: Tensor
) -> list[Tensor]:
    """Gradients of scale·loss by both inputs, for every scale: how one of them rounds is luck."""
    found = []
    for scale in scales:
        leaves = [x.detach().requires_grad_() for x in inputs]
        found.append(torch.autograd.grad(scale * loss(*leaves), leaves))
    return [torch.stack(gradients) for gradients in zip(*found, strict=True)]


def add_product(total: Tensor, a: Tensor, b: Tensor, scale: float) -> None:
    """Products added up in float32, as on a GPU."""
    total.copy_((scale * total.float() if scale else 0) + a.float() @ b.float())


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("ignored", [0, 0.3])
@pytest.mark.usefixtures("device_kind")
def test_a_product_in_two_parts_is_rounded_once(
    dtype: torch.dtype, ignored: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Products add up in float32, as on a GPU, and a few classes have one of their own."""

    monkeypatch.setattr(linear, "_add_product", add_product)
    p = make_problem(n=64, d=16, v=203, dtype=dtype, ignored=ignored)

    def gradients_with(parts: list[slice]) -> list[Tensor]:
        monkeypatch.setattr(linear, "_parts", lambda _: parts)
        return gradients(lambda h, w: linear_token_nll(h, w, p.labels).sum(), p.hidden, p.weight)[1]

    exact = gradients(lambda h, w: p.exact(h @ w.T).sum(), p.hidden.double(), p.weight.double())[1]
    whole, split = gradients_with([slice(0, 203)]), gradients_with([slice(0, 200), slice(200, 203)])
    for x, y, truth in zip(split, whole, exact, strict=True):
        assert oracle.relative_error(x, truth) <= 1.05 * oracle.relative_error(y, truth)


@pytest.mark.parametrize("few", [1, 3, 64])
@pytest.mark.parametrize("chunk", [16, 64])
def test_one_pass_is_as_accurate_as_eager_if_sums_are_in_float32(
    few: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU. Of few rows it is luck how they round, so these are several problems."""
    monkeypatch.setattr(linear, "_add_product", add_product)
    monkeypatch.setattr(linear, "chunk_rows", lambda *_: chunk)
    monkeypatch.setattr(devices, "can_look", lambda _: False)
    found: dict[str, list[list[Tensor]]] = {"exact": [], "eager": [], "ours": []}
    for seed in range(8):
        p = make_problem(n=64, d=32, v=499, dtype=torch.bfloat16, seed=seed)
        extra = extra_weights(p.exact(p.hidden.double() @ p.weight.double().T), few, seed).float()

        def exact(h: Tensor, w: Tensor, p: Problem = p, extra: Tensor = extra) -> Tensor:
            return ((0.1 + extra.double()) * p.exact(h.double() @ w.double().T)).sum()

        def eager(h: Tensor, w: Tensor, p: Problem = p, extra: Tensor = extra) -> Tensor:
            nll = torch.nn.functional.cross_entropy((h @ w.T).float(), p.labels, reduction="none")
            return ((0.1 + extra) * nll).sum()

        def ours(h: Tensor, w: Tensor, p: Problem = p, extra: Tensor = extra) -> Tensor:
            total, nll = linear_nll_sum(h, w, p.labels, few=few)
            return 0.1 * total + (extra * nll).sum()

        inputs = p.hidden, p.weight
        found["exact"].append(gradients(exact, *(x.double() for x in inputs))[1])
        found["eager"].append(gradients(eager, *inputs)[1])
        found["ours"].append(gradients(ours, *inputs)[1])
    for i, of in enumerate(("hidden", "weight")):
        x = {name: torch.stack([g[i] for g in grads]) for name, grads in found.items()}
        error, limit = (oracle.relative_error(x[name], x["exact"]) for name in ("ours", "eager"))
        assert error <= 1.1 * limit, of


@pytest.mark.parametrize("one_pass", [True, False])
def test_full_precision_adds_up_few_classes_at_once(one_pass: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, cuBLAS may add up the products of all classes one by one."""
    monkeypatch.setattr(devices, "can_look", lambda _: False)
    monkeypatch.setattr(linear, "SUMMANDS", 100)
    summed: list[int] = []
    add_product = linear._add_product

    def counting(total: Tensor, a: Tensor, b: Tensor, scale: float) -> None:
        if len(b) != 32:  # rows of hidden: the gradient of the weight
            summed.append(len(b))
        add_product(total, a, b, scale)

    monkeypatch.setattr(linear, "_add_product", counting)
    p = make_problem(n=32, d=8, v=250, dtype=torch.float32, ignored=0)

    def total(h: Tensor, w: Tensor) -> Tensor:
        if one_pass:
            return linear_nll_sum(h, w, p.labels, few=0)[0]
        return linear_token_nll(h, w, p.labels).sum()

    gradients(total, p.hidden, p.weight)
    assert summed == [100, 100, 50]


@pytest.mark.parametrize("one_pass", [True, False])
@pytest.mark.usefixtures("device_kind")
def test_half_precision_sums_many_chunks_in_float32(one_pass: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """1024 chunks that all add a half: a sum in bfloat16 stops growing long before the end."""
    monkeypatch.setattr(linear, "chunk_rows", lambda *_: 1)
    hidden = torch.ones(1024, 1, dtype=torch.bfloat16)
    labels = torch.zeros(1024, dtype=torch.int64)

    def grad(accum_dtype: torch.dtype | None) -> list[float]:
        weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
        nll = partial(linear_nll_sum, few=0) if one_pass else linear_token_nll
        nll(hidden, weight, labels, accum_dtype=accum_dtype)[0 if one_pass else ...].sum().backward()
        assert weight.grad is not None
        assert weight.grad.dtype == torch.bfloat16
        return weight.grad.flatten().tolist()

    assert grad(None) == grad(torch.float32) == [-512, 512]
    assert grad(torch.bfloat16) == [-128, 128]


def test_float16_sums_over_chunks_do_not_overflow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of three chunks add up to 80,000, beyond float16; the third takes half of it back."""
    monkeypatch.setattr(linear, "chunk_rows", lambda *_: 800)
    hidden = torch.full((2400, 1), 100.0, dtype=torch.float16)
    weight = torch.zeros(2, 1, dtype=torch.float16, requires_grad=True)
    labels = (torch.arange(2400) >= 1600).long()
    (grad,) = torch.autograd.grad(linear_token_nll(hidden, weight, labels).sum(), weight)
    assert grad.flatten().tolist() == [-40000, 40000]


# Inputs as they come -----------------------------------------------------------------------------------


EXACT = {"rtol": 0.0, "atol": 0.0}


@with_fused
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.usefixtures("rows_at_a_time")
def test_strides(backend: str, dtype: torch.dtype) -> None:
    x = torch.randn(3, 5, 11).to(dtype)
    labels = torch.randint(11, (3, 5))
    labels[1, 2] = IGNORED
    expected = gradients(lambda x: token_nll(x, labels, backend=backend).sum(), x)
    for name, same in layouts(x).items():
        assert torch.equal(same, x), name
        same.requires_grad_()
        nll = token_nll(same, labels, backend=backend)
        (grad,) = torch.autograd.grad(nll.sum(), same)
        # Kernels add up vectors of 16 bytes, whose boundaries lie elsewhere in another layout.
        tolerance = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 1e-6} if backend == "triton" else EXACT
        torch.testing.assert_close(nll.sum(), expected[0], **tolerance, msg=name)
        torch.testing.assert_close(grad, expected[1][0], **tolerance, msg=name)


@pytest.mark.parametrize("v", [1, 3])
def test_rows_shorter_than_a_vector(v: int) -> None:
    """Most begin within one of 16 bytes, and end there too."""
    x, labels = torch.randn(5, v, dtype=torch.bfloat16), torch.arange(5) % v
    torch.testing.assert_close(*(token_nll(x, labels, backend=backend) for backend in ("triton", "chunked")))


def test_more_than_2_to_the_31_logits() -> None:
    """One row, seen 2¹⁴ + 1 times by a stride of 0: no memory, but more elements than 32 bits count."""
    v = 2**17
    row = torch.randn(v)
    n = 2**14 + 1
    nll = token_nll(row.expand(n, v), torch.full((n,), 5))
    torch.testing.assert_close(nll, (row.logsumexp(0) - row[5]).expand(n))


def test_rows_more_than_2_to_the_31_elements_apart() -> None:
    """Two rows of kernels, far from each other in memory that nobody ever touches."""
    apart = 2**31 + 6
    x = torch.empty(apart + 61, dtype=torch.bfloat16).as_strided((2, 61), (apart, 1))
    x.copy_(torch.randn(2, 61))
    labels = torch.tensor([3, 60])
    nll = token_nll(x, labels, backend="triton")
    torch.testing.assert_close(nll, token_nll(x.clone(), labels))
    grad = torch.empty(2, 61)
    norm = torch.stack([x.float().amax(-1), (x.float() - x.float().amax(-1, keepdim=True)).logsumexp(-1)], -1)
    triton.token_nll_backward(torch.ones(2), x, labels, norm, Options(), out=grad)
    torch.testing.assert_close(grad.sum(-1), torch.zeros(2), atol=1e-5, rtol=0)


@with_fused
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("label_dtype", [torch.int32, torch.int64], ids=str)
def test_dtypes(backend: str, dtype: torch.dtype, label_dtype: torch.dtype) -> None:
    p = make_problem(dtype=dtype)
    nll = token_nll(p.logits, p.labels.to(label_dtype), backend=backend)
    assert nll.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(nll, p.exact(p.logits).to(nll.dtype), rtol=1e-5, atol=1e-5)
    for gradient, leaf in zip(
        gradients(lambda h, w: linear_token_nll(h, w, p.labels, backend=backend).sum(), p.hidden, p.weight)[
            1
        ],
        (p.hidden, p.weight),
        strict=True,
    ):
        assert gradient.dtype == leaf.dtype


@with_backend
def test_metrics(backend: str) -> None:
    p = make_problem()
    logits = p.logits
    logits[0, p.labels[0]] = 100  # one that is right for sure
    assert p.labels[0] != IGNORED
    nll, metrics = token_nll(logits, p.labels, return_metrics=True, backend=backend)
    q = logits.softmax(-1)
    entropy = torch.where(p.valid, -(q * q.log()).nansum(-1), 0)
    torch.testing.assert_close(nll, p.exact(logits), **TIGHT)
    torch.testing.assert_close(metrics.entropy, entropy, **TIGHT)
    assert torch.equal(metrics.correct, (logits.argmax(-1) == p.labels) & p.valid)
    assert metrics.correct[0]
    _, linear = linear_token_nll(p.hidden, p.weight, p.labels, p.bias, return_metrics=True, backend=backend)
    _, from_logits = token_nll(p.logits, p.labels, return_metrics=True, backend=backend)
    torch.testing.assert_close(linear, from_logits)
    if backend != "reference":
        inputs = p.hidden, p.weight, p.labels, p.bias
        one_pass = {
            few: linear_nll_sum(*inputs, few=few, return_metrics=True, backend=backend) for few in (0, 1, 3)
        }
        for _, nll, metrics in one_pass.values():
            torch.testing.assert_close(nll, p.exact(p.logits), **TIGHT)
            torch.testing.assert_close(metrics, from_logits)


@with_backend
@pytest.mark.parametrize(("offset", "spread"), [(1000, 1), (0, 12)])
def test_entropy_keeps_its_digits(backend: str, offset: float, spread: float) -> None:
    x = spread * torch.randn(64, 500, generator=torch.Generator().manual_seed(0)) + offset
    _, metrics = token_nll(x, torch.zeros(64, dtype=torch.int64), return_metrics=True, backend=backend)
    p = x.double().softmax(-1)
    exact = torch.special.entr(p).sum(-1)
    assert ((metrics.entropy - exact).abs() <= 1e-5 * exact + 1e-6).all()


@with_fused
@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_label_smoothing_keeps_its_digits(backend: str, offset: float) -> None:
    """What all logits have in common is not added up a thousand times."""
    x = torch.randn(8, 1000, generator=torch.Generator().manual_seed(0)) + offset
    labels = torch.arange(8)

    def smoothed(x: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(x, labels, label_smoothing=0.1, reduction="none")

    nll = token_nll(x, labels, label_smoothing=0.1, backend=backend)
    error, eager = (oracle.relative_error(y, smoothed(x.double())) for y in (nll, smoothed(x)))
    assert error <= NO_WORSE[backend] * eager


# Edges -------------------------------------------------------------------------------------------------


@with_fused
@pytest.mark.usefixtures("unwritten_is_nan")
def test_the_norm_of_ignored_rows_is_written(backend: str) -> None:
    p = make_problem()
    assert (p.labels == IGNORED).any()
    assert backends.load(backend).token_nll(p.logits, p.labels, 0, Options())[1].isfinite().all()


@with_backend
@pytest.mark.usefixtures("device_kind")
@pytest.mark.parametrize("junk", [torch.nan, torch.inf, -torch.inf])
def test_ignored_rows_may_hold_anything(backend: str, junk: float) -> None:
    p = make_problem()
    logits = p.logits
    logits[~p.valid] = junk
    _, (grad,) = gradients(lambda x: token_nll(x, p.labels, backend=backend, z_loss=0.1).sum(), logits)
    clean = gradients(lambda x: token_nll(x, p.labels, backend=backend, z_loss=0.1).sum(), p.logits)
    torch.testing.assert_close(grad, clean[1][0], **TIGHT)


@pytest.mark.usefixtures("device_kind")
@pytest.mark.parametrize("junk", [torch.nan, torch.inf])
@pytest.mark.parametrize("ignored", [0.3, 1.0])
@pytest.mark.parametrize("path", ["reference", *PATHS])
def test_ignored_hidden_states_may_hold_anything(junk: float, ignored: float, path: str) -> None:
    p = make_problem(ignored=ignored)
    hidden = p.hidden.clone()
    hidden[~p.valid] = junk

    def loss(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        backend, _, one_pass = path.partition(", ")
        if one_pass:
            total, nll = linear_nll_sum(h, w, p.labels, b, few=23, backend=backend)
            return total + 0.5 * nll.sum()
        return linear_token_nll(h, w, p.labels, b, backend=backend).sum()

    clean = gradients(loss, p.hidden, p.weight, p.bias)
    torch.testing.assert_close(gradients(loss, hidden, p.weight, p.bias), clean, **TIGHT)


@with_fused
@pytest.mark.parametrize("label", [-1, 64, 10**9])
@pytest.mark.parametrize("path", ["logits", "linear", "one pass"])
def test_a_bad_label_shows_where_it_cannot_be_looked_for(
    backend: str, path: str, label: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One past the end of a row would be the start of the next: rows of 64 have nothing in between."""
    monkeypatch.setattr(devices, "can_look", lambda _: False)
    p = make_problem(n=6, v=64, ignored=0)
    p.labels[4] = label

    def losses(h: Tensor) -> Tensor:
        if path == "logits":
            return token_nll(h @ p.weight.T, p.labels, backend=backend)
        if path == "linear":
            return linear_token_nll(h, p.weight, p.labels, backend=backend)
        return linear_nll_sum(h, p.weight, p.labels, few=0, backend=backend)[0]

    value, (grad,) = gradients(lambda h: losses(h).sum(), p.hidden)
    assert value.isnan()
    assert grad.isnan().all(-1).nonzero().tolist() == [[4]]


@with_backend
def test_masked_vocabulary(backend: str) -> None:
    p = make_problem(ignored=0)
    logits = p.logits
    masked = torch.zeros_like(logits, dtype=torch.bool)
    masked[:, ::3] = True
    masked[torch.arange(len(logits)), p.labels] = False
    logits[masked] = -torch.inf
    exact, (expected,) = gradients(lambda x: p.exact(x).sum(), logits)
    value, (got,) = gradients(lambda x: token_nll(x, p.labels, backend=backend).sum(), logits)
    torch.testing.assert_close(value, exact, **TIGHT)
    torch.testing.assert_close(got, expected.nan_to_num(0), **TIGHT)
    assert (got[masked] == 0).all()


@with_backend
def test_a_label_that_is_masked_has_an_infinite_loss(backend: str) -> None:
    logits = torch.zeros(2, 3)
    logits[0, 1] = -torch.inf
    assert token_nll(logits, torch.tensor([1, 1]), backend=backend).tolist()[0] == torch.inf


@with_backend
@pytest.mark.parametrize("label_smoothing", [0.1, 0.5, 0.9])
def test_smoothing_over_a_masked_class_has_an_infinite_loss(backend: str, label_smoothing: float) -> None:
    logits = torch.tensor([[0.0, 1.0, -torch.inf], [0.0, 1.0, 2.0]])
    options: Any = {"label_smoothing": label_smoothing, "backend": backend}
    for label in range(3):
        nll = token_nll(logits, torch.tensor([label, label]), **options)
        assert nll.isinf().tolist() == [True, False]


@with_backend
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_and_infinity_show(backend: str, bad: float) -> None:
    p = make_problem(ignored=0)
    logits = p.logits
    logits[3, 5] = bad
    nll = token_nll(logits, p.labels, backend=backend)
    _, (grad,) = gradients(lambda x: token_nll(x, p.labels, backend=backend).sum(), logits)
    assert nll.isnan().nonzero().tolist() == [[3]]
    assert grad.isnan().any(-1).nonzero().tolist() == [[3]]


@pytest.mark.parametrize("label", [-1, 61, 2**40, -(2**40)])
@pytest.mark.parametrize("path", ["logits", "reference", "linear", "one pass", "triton"])
def test_a_label_out_of_range_is_an_error(label: int, path: str) -> None:
    p = make_problem()
    p.labels[4] = label
    call = {
        "logits": lambda: token_nll(p.logits, p.labels),
        "reference": lambda: token_nll(p.logits, p.labels, backend="reference"),
        "linear": lambda: linear_token_nll(p.hidden, p.weight, p.labels),
        "triton": lambda: token_nll(p.logits, p.labels, backend="triton"),
        "one pass": lambda: linear_nll_sum(p.hidden.requires_grad_(), p.weight, p.labels, few=0),
    }[path]
    with pytest.raises(ValueError, match=rf"labels .*\[0, 61\).*ignore_index=-100.* got {label}$"):
        call()


@pytest.mark.parametrize("ignore_index", [-1, 0, 7, 10**6])
def test_ignore_index(ignore_index: int) -> None:
    p = make_problem()
    labels = torch.where(p.valid, p.labels.clamp(min=8), ignore_index)
    nll = token_nll(p.logits, labels, ignore_index=ignore_index)
    expected = torch.nn.functional.cross_entropy(
        p.logits, labels, ignore_index=ignore_index, reduction="none"
    )
    torch.testing.assert_close(nll, expected, **TIGHT)


@with_fused
@pytest.mark.parametrize("shape", [(0, 5), (3, 0, 5), (0, 3, 5)])
def test_empty(backend: str, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, requires_grad=True)
    labels = torch.zeros(shape[:-1], dtype=torch.int64)
    nll, metrics = token_nll(x, labels, return_metrics=True, backend=backend)
    nll.sum().backward()
    assert nll.shape == metrics.entropy.shape == metrics.correct.shape == shape[:-1]
    assert x.grad is not None
    assert x.grad.shape == shape


# Errors ------------------------------------------------------------------------------------------------

X, W, Y = torch.zeros(2, 3, 5), torch.zeros(7, 5), torch.zeros(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: token_nll([1.0], Y), TypeError, "logits must be a tensor, got list"),
        (lambda: token_nll(X.long(), Y), TypeError, "logits must be float16, .* or float64, got torch.int64"),
        (lambda: token_nll(X.to(torch.float8_e5m2), Y), TypeError, "logits must be .* got torch.float8_e5m2"),
        (lambda: nvamp_loss([1.0], Y), TypeError, "logits must be a tensor, got list"),
        (lambda: nvamp_loss(X[0, 0, 0], Y[0, 0]), ValueError, "logits must have shape"),
        (lambda: nvamp_loss(X, Y[0]), ValueError, "labels must have shape"),
        (lambda: linear_nvamp_loss(3, W, Y), TypeError, "hidden must be a tensor, got int"),
        (lambda: linear_nvamp_loss(X, [W], Y), TypeError, "weight must be a tensor, got list"),
        (lambda: linear_nvamp_loss(X, W, Y, [1]), TypeError, "bias must be a tensor, got list"),
        (lambda: linear_token_nll(3, W, Y), TypeError, "hidden must be a tensor, got int"),
        (lambda: token_weights(NVAMP(), Y), TypeError, "nll must be float16"),
        (lambda: token_weights(NVAMP(), X, Y), ValueError, r"valid must be bool, .* got torch.int64 \[2, 3\]"),
        (lambda: token_nll(X[0, 0], Y), ValueError, r"logits must have shape \[..., vocabulary\], got \[5\]"),
        (lambda: token_nll(X[..., :0], Y), ValueError, r"logits must have .* got \[2, 3, 0\]"),
        (lambda: token_nll(X, Y[0]), ValueError, r"labels must have shape \[2, 3\].* got \[3\]"),
        (lambda: token_nll(X, X[..., 0]), TypeError, "labels must be int64, int32 or uint8 .* got torch.float32"),
        (lambda: token_nll(X, Y.bool()), TypeError, "labels must be int64, int32 or uint8 .* got torch.bool"),
        (lambda: token_nll(X, 3), TypeError, "labels must be a tensor, got int"),
        (lambda: token_nll(X, Y.to("meta")), ValueError, "labels must be on the device of logits, cpu, got meta"),
        (lambda: token_nll(X, Y, backend="cuda"), ValueError, "backend must be one of reference, chunked"),
        (lambda: token_nll(X, Y, label_smoothing=1.5), ValueError, r"label_smoothing must be in \[0, 1\], got 1.5"),
        (lambda: token_nll(X, Y, z_loss=-1), ValueError, "z_loss must be .* at least 0, got -1"),
        (lambda: token_nll(X, Y, softcap=0), ValueError, "softcap must be .* above 0, got 0"),
        (lambda: token_nll(X, Y, logit_scale=0), ValueError, "logit_scale must not be 0"),
        (lambda: linear_token_nll(X, W.T, Y), ValueError, r"weight must have shape \[vocabulary, 5\].* got \[5, 7\]"),
        (lambda: linear_token_nll(X[..., :0], W[:, :0], Y), ValueError, r"hidden must have .* got \[2, 3, 0\]"),
        (lambda: linear_token_nll(X[0, 0], W, Y), ValueError, r"hidden must have shape \[..., features\]"),
        (lambda: linear_token_nll(X, W[:0, 0], Y), ValueError, r"got \[0\], as .* ZeRO-3 .* leave it after the backward"),
        (lambda: linear_token_nll(X, W.half(), Y), TypeError, "weight must have the dtype of hidden, torch.float32"),
        (lambda: linear_token_nll(X, W, Y, W[0]), ValueError, r"bias must have shape \[7\], got \[5\]"),
        (lambda: linear_token_nll(X, W.to("meta"), Y), ValueError, "weight must be on the device of hidden"),
        (lambda: linear_nll_sum(X, W[:0, 0], Y, few=0), ValueError, r"within deepspeed.zero.GatheredParameters"),
        (lambda: linear_nll_sum(X, W, Y, few=-1), ValueError, "few must be at least 0, got -1"),
        (lambda: linear_token_nll(X, W, Y, accum_dtype=torch.half), ValueError, "accum_dtype must be torch.float32 for"),
        (lambda: linear_token_nll(X.half(), W.half(), Y, accum_dtype=torch.float64), ValueError, "float16 or torch.float32"),
    ],
)  # fmt: skip
def test_errors_name_the_argument(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
