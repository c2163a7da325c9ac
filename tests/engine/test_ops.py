"""The operators as PyTorch's own checks, compilers and autograd see them."""

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import nvamp
from nvamp.engine import chunked, linear, linear_nll_sum, operator
from nvamp.engine import ops as engine
from nvamp.engine.options import Head, Options
from nvamp.functional import linear_token_nll, token_nll
from tests.engine.problems import HALF, IGNORED, OPTIONS, gradients, make_problem

ops = torch.ops.nvamp


with_backend = pytest.mark.parametrize("backend", ["chunked", "triton"])


@pytest.fixture(params=["plain", "registered"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls that go round the dispatcher, and the same through it."""
    if request.param == "registered":
        monkeypatch.setattr(operator, "is_plain", lambda _: False)


both_ways = pytest.mark.usefixtures("way")


def flat(backend: str = "chunked", **options: Any) -> tuple[Any, ...]:
    return backend, *Options(IGNORED, **options)


@pytest.mark.parametrize("options", [OPTIONS["plain"], OPTIONS["all"]], ids=["plain", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("metrics", [0, 2, 3])
@with_backend
def test_opcheck_of_the_primitives(
    options: dict[str, Any], dtype: torch.dtype, metrics: int, backend: str
) -> None:
    p = make_problem(n=6, d=4, v=9, dtype=dtype)
    logits = p.logits.detach().requires_grad_()
    head = [x.requires_grad_() for x in (p.hidden, p.weight, p.bias)]
    torch.library.opcheck(
        ops.token_nll.default, (logits, p.labels, metrics, False, *flat(backend, **options))
    )
    torch.library.opcheck(
        ops.linear_token_nll.default, (*head, p.labels, metrics, None, *flat(backend, **options))
    )
    torch.library.opcheck(
        ops.linear_token_nll.default, (*head[:2], None, p.labels, metrics, None, *flat(backend, **options))
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("trained", [(True, True, True), (True, False, False), (False, True, False)])
@pytest.mark.parametrize(("few", "metrics"), [(0, 2), (1, 0), (3, 0), (1, 2)])
@with_backend
def test_opcheck_of_the_one_pass_operator(
    dtype: torch.dtype, trained: tuple[bool, ...], few: int, metrics: int, backend: str
) -> None:
    p = make_problem(n=6, d=4, v=9, dtype=dtype)
    head = [x.requires_grad_(t) for x, t in zip((p.hidden, p.weight, p.bias), trained, strict=True)]
    torch.library.opcheck(
        ops.linear_nll_sum.default, (*head, p.labels, *trained, few, metrics, False, None, *flat(backend))
    )


@with_backend
@pytest.mark.usefixtures("device_kind")
def test_opcheck_of_the_backward_operators(backend: str) -> None:
    p = make_problem(n=6, d=4, v=9)
    head = (p.hidden, p.weight, p.bias, p.labels)
    needs = (True, True, False)
    nll, norm, entropy, *_ = ops.token_nll(p.logits, p.labels, 2, False, *flat(backend))
    for classes, of_entropy in product((None, torch.tensor(11)), ((None, None), (entropy, nll))):
        of_rows = norm, classes, None, *of_entropy
        torch.library.opcheck(
            ops.token_nll_backward.default, (nll, p.logits, p.labels, *of_rows, *flat(backend))
        )
        torch.library.opcheck(
            ops.linear_token_nll_backward.default, (nll, *of_rows, *head, *needs, None, *flat(backend))
        )
    for few in (0, 1, 3):
        total, nll, *rest = ops.linear_nll_sum(*head, *needs, few, 0, False, None, *flat(backend))
        units = rest[4:]
        torch.library.opcheck(
            ops.linear_nll_sum_backward.default,
            (total, nll if few else None, *units, *head, *needs, few, None, *flat(backend)),
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("v", "metrics"), [(9, 0), (9, 2), (9, 3), (0, 3)])
@with_backend
def test_opcheck_of_the_operators_on_parts(backend: str, v: int, metrics: int, dtype: torch.dtype) -> None:
    p = make_problem(n=6, d=4, v=9, dtype=dtype)
    logits, weight, bias = p.logits[:, :v], p.weight[:v], p.bias[:v]
    head = [x.detach().requires_grad_() for x in (p.hidden, weight, bias)]
    logits, args = logits.detach().requires_grad_(), flat(backend, **OPTIONS["all"])
    torch.library.opcheck(ops.part_statistics.default, (logits.detach(), p.labels, metrics, *args))
    torch.library.opcheck(
        ops.linear_part_statistics.default, (*(x.detach() for x in head), p.labels, metrics, None, *args)
    )
    whole = (torch.zeros(6, 2), torch.zeros(6), torch.tensor(11), None, torch.zeros(6) if metrics else None)
    torch.library.opcheck(ops.part_nll.default, (logits, p.labels, *whole, False, *args))
    torch.library.opcheck(ops.linear_part_nll.default, (*head, p.labels, *whole, None, *args))


gradcheck = partial(torch.autograd.gradcheck, fast_mode=True)  # along random directions


@with_backend
def test_gradcheck(backend: str) -> None:
    p = make_problem(n=4, d=2, v=5)
    inputs = [x.requires_grad_() for x in (p.hidden, p.weight, p.bias)]
    options: Any = {"backend": backend, **OPTIONS["all"]}
    gradcheck(lambda x: token_nll(x, p.labels, **options), p.logits.detach().requires_grad_())
    gradcheck(lambda h, w, b: linear_token_nll(h, w, p.labels, b, **options), inputs)
    gradcheck(lambda h, w, b: linear_nll_sum(h, w, p.labels, b, few=4, **options), inputs)
    for few in (0, 1):
        gradcheck(lambda h, w, b, few=few: linear_nll_sum(h, w, p.labels, b, few=few, **options)[0], inputs)


FEW = [0, 1, 5]
with_few = pytest.mark.parametrize("few", FEW)


def extra_of(nll: Tensor, few: int) -> Tensor:
    """Extra weights [N]: of the `few` largest losses, the first of equals, and 0 elsewhere."""
    rank = nll.detach().argsort(descending=True, stable=True).argsort()
    return torch.where(rank < few, 0.5 - rank.to(nll.dtype), 0)


def one_pass(h: Tensor, w: Tensor, labels: Tensor, few: int = 1, backend: str | None = None) -> Tensor:
    total, nll = linear_nll_sum(h, w, labels, few=few, backend=backend)
    return 0.3 * total + (extra_of(nll, few) * nll).sum()


@with_few
@both_ways
def test_backward_twice_gives_the_same(few: int) -> None:
    p = make_problem()
    h, w = p.hidden.requires_grad_(), p.weight.requires_grad_()
    loss = one_pass(h, w, p.labels, few)
    first = torch.autograd.grad(loss, (h, w), retain_graph=True)
    kept = [x.clone() for x in first]
    second = torch.autograd.grad(loss, (h, w), retain_graph=True)
    third = torch.autograd.grad(loss, (h, w))
    for a, b, c in zip(kept, second, third, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, (h, w))


@pytest.mark.parametrize("few", [*FEW, "a fifth"])
@with_backend
def test_one_pass_compiles_without_a_break(few: int | str, backend: str) -> None:
    """Once for any number of tokens."""

    def loss(h: Tensor, w: Tensor, labels: Tensor) -> Tensor:
        return one_pass(h, w, labels, labels.shape[0] // 5 if isinstance(few, str) else few, backend)

    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for n in (23, 37):
            p = make_problem(n=n)
            torch._dynamo.mark_dynamic(p.labels, 0)
            hidden, weight = p.hidden.requires_grad_(), p.weight.requires_grad_()
            torch._dynamo.mark_dynamic(hidden, 0)
            results = []
            for f in (compiled, loss):
                value = f(hidden, weight, p.labels)
                results.append([value.detach(), *torch.autograd.grad(value, (hidden, weight))])
            torch.testing.assert_close(*results)


@both_ways
def test_checkpointing() -> None:
    p = make_problem()
    inputs = p.hidden, p.weight
    losses = [
        partial(nvamp.functional.linear_nvamp_loss, labels=p.labels, shift=False, gradient=gradient)
        for gradient in nvamp.objectives.GRADIENTS
    ]
    for loss in (*losses, *(partial(one_pass, labels=p.labels, few=few) for few in FEW)):
        got = gradients(lambda *x, loss=loss: checkpoint(loss, *x, use_reentrant=False), *inputs)
        torch.testing.assert_close(got, gradients(loss, *inputs))


@with_few
def test_what_a_hook_saved_stays_as_it_is(few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The backward finishes gradients in place, and frees one that it has rounded; not if a hook keeps them."""
    monkeypatch.setattr(linear, "held_dtype", lambda *_: torch.float32)  # as on a GPU
    p = make_problem(dtype=torch.bfloat16)
    h, w = p.hidden.requires_grad_(), p.weight.requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (kept.append(x), x)[1], lambda x: x):
        loss = one_pass(h, w, p.labels, few)
    before = [x.clone() for x in kept]
    loss.backward()
    for x, same in zip(kept, before, strict=True):
        assert x.untyped_storage().nbytes() >= x.nbytes
        assert torch.equal(x, same)


@with_backend
def test_negative_views(backend: str) -> None:
    """PyTorch hands over tensors whose numbers are the negative of what their memory holds."""
    x, labels, weights = torch.randn(3, 9), torch.tensor([1, 2, 3]), torch.tensor([0.5, 1.0, 2.0])
    (plain,) = gradients(lambda x: (token_nll(x, labels, backend=backend) * weights).sum(), -x)[1]
    negative = torch._neg_view(x).requires_grad_()
    nll = token_nll(negative, labels, backend=backend)
    torch.testing.assert_close(nll, token_nll(-x, labels, backend=backend))
    (grad,) = torch.autograd.grad(nll, negative, torch._neg_view(-weights))
    torch.testing.assert_close(grad, plain)


# Round the dispatcher -----------------------------------------------------------------------------------


def dispatched(run: Callable[[], object]) -> set[str]:
    """The names of the operators that went through the dispatcher."""
    names: set[str] = set()
    with pytest.MonkeyPatch.context() as patch:
        for op in vars(engine).values():
            if isinstance(op, operator.Operator):

                def registered(*args: Any, call: Any = op.registered) -> Any:
                    names.add(call._name)
                    return call(*args)

                patch.setattr(op, "registered", registered)
        run()
    return names


def runs(backend: str, create_graph: bool = False) -> dict[str, Callable[[], list[Tensor]]]:
    """Results and gradients of every operator that has some."""
    p = make_problem(dtype=torch.float32)

    def run(f: Callable[..., Any], *inputs: Tensor) -> list[Tensor]:
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        results = f(*leaves)
        results = [results] if isinstance(results, Tensor) else list(results)
        scalars = [(x * torch.arange(x.numel()).view(x.shape)).sum() for x in results if x.requires_grad]
        grads = torch.autograd.grad(sum(scalars), leaves, create_graph=create_graph)  # type: ignore[arg-type]
        return [*(x.detach() for x in results), *grads]

    head, y = (p.hidden, p.weight, p.bias), p.labels
    whole = engine.Whole(torch.randn(23, 2), torch.randn(23), torch.tensor(99), None, torch.randn(23))
    options: Any = {"backend": backend, **OPTIONS["all"]}
    args = backend, Options(IGNORED, **OPTIONS["all"])
    return {
        "logits": lambda: run(lambda x: token_nll(x, y, **options), p.logits),
        "in place": lambda: run(lambda x: token_nll(2 * x, y, inplace_backward=True, **options), p.logits),
        "linear": lambda: run(lambda h, w, b: linear_token_nll(h, w, y, b, **options), *head),
        **{
            f"one pass, {few}": lambda few=few: run(
                lambda h, w, b: linear_nll_sum(h, w, y, b, few=few, **options), *head
            )
            for few in (0, len(y))
        },
        "one pass, 1": lambda: run(
            lambda h, w, b: ((total := linear_nll_sum(h, w, y, b, few=1, **options))[0], total[1].max()),
            *head,
        ),
        "part": lambda: run(lambda x: engine.part_nll(x, y, whole, False, *args), p.logits),
        "linear part": lambda: run(
            lambda h, w, b: engine.linear_part_nll(Head(h, w, b, y), whole, None, *args), *head
        ),
        "statistics of a part": lambda: list(engine.part_statistics(p.logits, y, 3, *args)),
        "statistics of a linear part": lambda: list(
            engine.linear_part_statistics(Head(*head, y), 3, None, *args)
        ),
    }


@pytest.mark.parametrize("what", runs("chunked"))
@with_backend
def test_both_ways_give_the_same_bits(what: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    run = runs(backend)[what]
    assert dispatched(lambda: None) == dispatched(run) == set()
    plain = run()
    monkeypatch.setattr(operator, "is_plain", lambda _: False)
    assert dispatched(run)
    for a, b in zip(plain, run(), strict=True):
        assert torch.equal(a, b)


@both_ways
@with_backend
def test_second_derivatives_are_refused(backend: str) -> None:
    for name, run in runs(backend, create_graph=True).items():
        if "statistics" not in name:
            with pytest.raises(NotImplementedError, match='use backend="reference" for second derivatives'):
                run()[-1].sum().backward()


class Subclass(Tensor):
    pass


class Watching(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Dispatching(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def under(mode: Any, f: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    def run(x: Tensor) -> Any:
        with mode():
            return f(x)

    return run


def batched(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Any]:
    def run(x: Tensor) -> Any:
        x = x.detach().requires_grad_()
        return torch.autograd.grad(f(x), x, torch.eye(len(x), dtype=x.dtype), is_grads_batched=True)

    return run


WATCHERS: dict[str, Callable[[Callable[[Tensor], Tensor]], Callable[[Tensor], Any]]] = {
    "dispatch mode": lambda f: under(Dispatching, f),
    "function mode": lambda f: under(Watching, f),
    "default device": lambda f: under(lambda: torch.device("cpu"), f),
    "fake tensors": lambda f: lambda x: f(FakeTensorMode(allow_non_fake_inputs=True).from_tensor(x)),
    "subclass": lambda f: lambda x: f(x.as_subclass(Subclass)),
    "no data": lambda f: lambda x: f(x.to("meta")),
    "vmap": lambda f: lambda x: torch.func.vmap(f)(x[None]),
    "vmap of something else": lambda f: lambda x: torch.func.vmap(lambda z: f(x) + z)(torch.zeros(3)),
    "functionalize": lambda f: torch.func.functionalize(f),
    "make_fx": lambda f: make_fx(f),
    "jit": lambda f: lambda x: torch.jit.trace(f, x),
    "batched gradients": batched,
}


@pytest.mark.parametrize("watched", WATCHERS.values(), ids=WATCHERS)
@pytest.mark.filterwarnings("ignore:`torch.jit.trace:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_who_looks_inside_sees_the_operator(watched: Any) -> None:
    p = make_problem()

    def nll(x: Tensor) -> Tensor:
        return token_nll(x, p.labels.to(x.device))

    assert not dispatched(lambda: nll(p.logits))
    assert dispatched(lambda: watched(nll)(p.logits))


# Overwriting the logits --------------------------------------------------------------------------------


def overwritten(make_logits: Any, backend: str = "chunked", **backward: Any) -> tuple[Tensor, bool]:
    """The gradient by hidden states, and whether it took the memory of the logits on its way there."""
    p = make_problem()
    hidden = p.hidden.detach().requires_grad_()
    logits = make_logits(hidden @ p.weight.T)
    before = logits.detach().clone()
    loss = (p.token_weights * token_nll(logits, p.labels, inplace_backward=True, backend=backend)).sum()
    (grad,) = torch.autograd.grad(loss, hidden, **backward)
    return grad, not torch.equal(logits, before)


@pytest.mark.parametrize("backend", ["chunked", "triton", "reference"])
@pytest.mark.usefixtures("rows_at_a_time")
def test_backward_in_the_memory_of_the_logits(backend: str) -> None:
    p = make_problem()
    ordinary = gradients(
        lambda h: (p.token_weights * token_nll(h @ p.weight.T, p.labels, backend=backend)).sum(), p.hidden
    )[1][0]
    grad, in_place = overwritten(lambda x: x, backend)
    torch.testing.assert_close(grad, ordinary)
    assert in_place == (backend != "reference")
    strided, in_place = overwritten(lambda x: torch.cat((x, x), 1)[:, : x.shape[1]], backend)
    torch.testing.assert_close(strided, ordinary)
    assert in_place == (backend != "reference")


@both_ways
def test_logits_are_left_alone_where_someone_may_need_them() -> None:
    p = make_problem()
    grad, in_place = overwritten(lambda x: x, retain_graph=True)
    assert not in_place
    one_row, in_place = overwritten(lambda x: x[:1].expand_as(x))  # all rows in the memory of one
    assert not in_place
    assert not torch.equal(one_row, grad)
    for view in (
        lambda x: x,
        lambda x: x[:, :],
        lambda x: x.view(1, *x.shape)[0],
    ):  # parameters and their memory
        leaf = p.logits.detach().requires_grad_()
        before = leaf.detach().clone()
        token_nll(view(leaf), p.labels, inplace_backward=True).sum().backward()
        assert torch.equal(leaf, before)
        assert leaf.grad is not None
        assert leaf.grad.data_ptr() != leaf.data_ptr()


@with_backend
def test_rows_that_cannot_be_merged_are_overwritten(backend: str) -> None:
    base, labels = torch.randn(4, 7, 14, requires_grad=True), torch.randint(11, (3, 5))

    def grad(inplace: bool) -> Tensor:
        logits = (base * 1)[1:, 1:-1, 2:-1]
        nll = token_nll(logits, labels, inplace_backward=inplace, backend=backend)
        return torch.autograd.grad(nll.sum(), base)[0]

    torch.testing.assert_close(grad(True), grad(False))


@both_ways
@with_backend
def test_logits_that_overlap_are_not_overwritten(backend: str) -> None:
    """Windows that move by one element: in their memory there is no room for the gradient of each."""
    base = torch.randn(12, generator=torch.Generator().manual_seed(3)).requires_grad_()

    def grad(inplace: bool, backend: str) -> Tensor:
        windows = (base * 1).unfold(0, 7, 1)
        nll = token_nll(windows, torch.arange(6), inplace_backward=inplace, backend=backend)
        return torch.autograd.grad(nll.sum(), base)[0]

    torch.testing.assert_close(grad(True, backend), grad(False, "reference"))


@both_ways
@with_backend
def test_who_needs_overwritten_logits_gets_an_error(backend: str) -> None:
    p = make_problem()
    logits = p.hidden.requires_grad_() @ p.weight.T
    other = logits.square().sum()  # its backward needs them, and comes second
    loss = token_nll(logits, p.labels, inplace_backward=True, backend=backend).sum() + other
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("how", ["checkpoint", "hooks"])
@both_ways
@with_backend
def test_nothing_is_overwritten_where_pytorch_would_not_see_it(backend: str, how: str) -> None:
    """Of tensors saved through hooks, autograd does not check the version, and their base is unknown."""
    p = make_problem()

    def run(f: Any, x: Tensor) -> Tensor:
        if how == "checkpoint":
            return checkpoint(f, x, use_reentrant=False)  # type: ignore[no-any-return]
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
            return f(x)  # type: ignore[no-any-return]

    def nll(x: Tensor, inplace: bool) -> Tensor:
        return token_nll(x, p.labels, inplace_backward=inplace, backend=backend).sum()

    cases: dict[str, Any] = {
        "an output that its own operation saved": lambda x, inplace: nll((x * 1).exp(), inplace),
        "an input of something before": lambda x, inplace: (
            (y := x * 1).logsumexp(-1).square().sum() + nll(y, inplace)
        ),
        "a view of a leaf": lambda x, inplace: nll(x.view_as(x), inplace),
    }
    for name, f in cases.items():
        leaf = p.logits.detach().clone().requires_grad_()
        (got,) = torch.autograd.grad(run(lambda x, f=f: f(x, True), leaf), leaf)
        (expected,) = torch.autograd.grad(f(leaf, False), leaf)
        assert torch.equal(leaf, p.logits), name
        assert torch.equal(got, expected), name


@both_ways
def test_the_loss_overwrites_logits() -> None:
    p = make_problem()
    logits = p.hidden.requires_grad_() @ p.weight.T
    before = logits.detach().clone()
    nvamp.NVAMPLoss(shift=False, inplace_backward=True)(logits, p.labels).backward()
    assert not torch.equal(logits, before)


def test_tied_and_transposed_weights() -> None:
    """The embedding is the head, and lies in memory the other way round."""
    p = make_problem(ignored=0)
    stored = p.weight.T.contiguous()
    tokens = p.labels.roll(1)

    def tied(stored: Tensor, linear: bool) -> Tensor:
        weight = stored.T
        hidden = weight[tokens].tanh()
        if linear:
            return nvamp.functional.linear_nvamp_loss(hidden, weight, p.labels, shift=False)
        return nvamp.functional.nvamp_loss(hidden @ weight.T, p.labels, shift=False, backend="reference")

    torch.testing.assert_close(
        gradients(lambda s: tied(s, True), stored), gradients(lambda s: tied(s, False), stored)
    )


def test_meta_tensors() -> None:
    h, w, y = (
        torch.empty(2, 3, 4, device="meta"),
        torch.empty(5, 4, device="meta"),
        torch.zeros(2, 3, device="meta").long(),
    )
    assert linear_token_nll(h, w, y).shape == (2, 3)
    assert nvamp.functional.linear_nvamp_loss(h, w, y).shape == ()


@with_few
@both_ways
def test_gradients_accumulate(few: int) -> None:
    """The gradient handed out is not the memory that a later call writes to."""
    p = make_problem()
    h, w = p.hidden.requires_grad_(), p.weight.requires_grad_()
    (once,) = torch.autograd.grad(one_pass(h, w, p.labels, few), w)
    once = once.clone()
    for _ in range(3):
        one_pass(h, w, p.labels, few).backward()
    torch.testing.assert_close(w.grad, 3 * once)


@pytest.mark.parametrize("gradient", nvamp.objectives.GRADIENTS)
@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("half", HALF, ids=str)
def test_autocast(
    gradient: nvamp.objectives.Gradient, enabled: bool, dtype: torch.dtype, half: torch.dtype
) -> None:
    """The linear loss casts as `F.linear` does; losses and statistics stay wide."""
    p = make_problem(dtype=dtype)
    options: Any = {"gradient": gradient, "shift": False}

    def linear(h: Tensor, w: Tensor) -> Tensor:
        with torch.autocast("cpu", half, enabled=enabled):
            return nvamp.functional.linear_nvamp_loss(h, w, p.labels, **options)

    def logits(h: Tensor, w: Tensor) -> Tensor:
        with torch.autocast("cpu", half, enabled=enabled):
            x = torch.nn.functional.linear(h, w)
            assert x.dtype == (half if enabled and dtype == torch.float32 else dtype)
            return nvamp.functional.nvamp_loss(x, p.labels, **options)

    value, grads = gradients(linear, p.hidden, p.weight)
    expected, expected_grads = gradients(logits, p.hidden, p.weight)
    assert value.dtype == dtype
    torch.testing.assert_close(value, expected)
    for a, b in zip(grads, expected_grads, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2 * float(b.abs().max()))


def test_mixed_dtypes_under_autocast_are_an_error() -> None:
    p = make_problem(dtype=torch.float32)
    with torch.autocast("cpu"), pytest.raises(TypeError, match="weight must have the dtype of hidden"):
        linear_token_nll(p.hidden, p.weight.double(), p.labels)


def test_chunk_sizes() -> None:
    """A block stays in cache, a chunk in 52 MiB; neither is ever empty."""
    cpu = torch.device("cpu")
    for vocab in (1, 8, 50257, 262144, 10**8):
        for dtype in (torch.bfloat16, torch.float32, torch.float64):
            assert chunked.block_rows(vocab, dtype, cpu) >= 1
    hidden, weight = torch.empty(8, 1, dtype=torch.bfloat16), torch.empty(50257, 1, dtype=torch.bfloat16)
    assert 1 <= linear.chunk_rows(hidden, weight, None) * 50257 * 2 <= 52 * 2**20
    assert linear.chunk_rows(hidden, torch.empty(1, 1).expand(10**9, 1), None) == 1
