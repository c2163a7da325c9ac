"""Entropy and what else a pass finds out of the predictions, against float64 autograd of the definition."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nvamp.engine import TokenMetrics, chunked, linear, operator, triton
from nvamp.functional import linear_token_nll, token_nll
from tests import oracle
from tests.engine.problems import (
    IGNORED,
    OPTIONS,
    Problem,
    assert_no_worse,
    gradients,
    layouts,
    make_problem,
    with_gradient,
)
from tests.engine.test_engine import NO_WORSE, TIGHT, with_backend, with_fused, with_options
from tests.strategies import Case, cases, examples

Weights = tuple[float, float]  # of the losses and of the entropies
with_weights = pytest.mark.parametrize("weights", [(0.0, 1.0), (1.0, -0.7)], ids=str)


def combined(p: Problem, weights: Weights, nll: Tensor, entropy: Tensor) -> Tensor:
    """A number that depends on each loss and each entropy, or on one kind of them only, with any weights."""
    w, other = p.token_weights, p.token_weights.flip(0)
    terms = [a * (b * x).sum() for a, b, x in zip(weights, (w, other), (nll, entropy), strict=True) if a]
    return torch.stack(terms).sum()


def from_logits(p: Problem, weights: Weights, **options: Any) -> Callable[[Tensor], Tensor]:
    def loss(x: Tensor) -> Tensor:
        nll, metrics = token_nll(x, p.labels, return_metrics=True, **options)
        return combined(p, weights, nll, metrics.entropy)

    return loss


def from_head(p: Problem, weights: Weights, **options: Any) -> Callable[..., Tensor]:
    def loss(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        nll, metrics = linear_token_nll(h, w, p.labels, b, return_metrics=True, **options)
        return combined(p, weights, nll, metrics.entropy)

    return loss


def exact(p: Problem, weights: Weights, **options: Any) -> Callable[[Tensor], Tensor]:
    return lambda x: combined(p, weights, p.exact(x, **options), p.exact_entropy(x, **options))


def exact_of_head(p: Problem, weights: Weights, **options: Any) -> Callable[..., Tensor]:
    return lambda h, w, b: exact(p, weights, **options)(torch.nn.functional.linear(h, w, b))


@with_weights
@with_options
@with_backend
@pytest.mark.usefixtures("rows_at_a_time")
def test_gradients_by_logits(backend: str, options: dict[str, Any], weights: Weights) -> None:
    p = make_problem()
    expected = gradients(exact(p, weights, **options), p.logits)
    got = gradients(from_logits(p, weights, backend=backend, **options), p.logits)
    torch.testing.assert_close(got, expected, **TIGHT)
    assert not got[1][0][~p.valid].any()


@with_options
@with_backend
@pytest.mark.usefixtures("setting")
def test_gradients_by_hidden_and_weight(backend: str, options: dict[str, Any]) -> None:
    p, weights = make_problem(), (1.0, -0.7)
    head = p.hidden, p.weight, p.bias
    expected = gradients(exact_of_head(p, weights, **options), *head)
    got = gradients(from_head(p, weights, backend=backend, **options), *head)
    torch.testing.assert_close(got, expected, **TIGHT)


gradcheck = partial(torch.autograd.gradcheck, fast_mode=True)  # along random directions


@with_fused
def test_gradcheck(backend: str) -> None:
    p = make_problem(n=3, d=2, v=5)
    options: Any = {"backend": backend, **OPTIONS["all"], "return_metrics": True}

    def results(nll: Tensor, metrics: TokenMetrics) -> tuple[Tensor, Tensor]:
        return nll, metrics.entropy

    gradcheck(lambda x: results(*token_nll(x, p.labels, **options)), p.logits.detach().requires_grad_())
    head = [x.requires_grad_() for x in (p.hidden, p.weight, p.bias)]
    gradcheck(lambda h, w, b: results(*linear_token_nll(h, w, p.labels, b, **options)), head)


@given(case=cases(dtypes=[torch.float64]))
@examples(40)
def test_any_batch(case: Case) -> None:
    """Entropies, their gradients, predictions and log-sum-exps of whatever batch."""
    x = case.logits.detach().requires_grad_()
    nll, metrics = case.with_small_blocks(
        lambda: token_nll(x, case.labels, return_metrics=True, mean_logit=True, **case.engine)
    )
    truth = case.logits.detach().clone().requires_grad_()
    entropies = oracle.entropies(truth[case.valid], **case.options)
    expected = torch.zeros(case.labels.shape, dtype=torch.float64).index_put((case.valid,), entropies)
    torch.testing.assert_close(metrics.entropy, expected, **TIGHT)
    exact_nll = case.exact(truth)
    torch.testing.assert_close(nll, exact_nll, **TIGHT)

    def loss(nll: Tensor, entropy: Tensor) -> Tensor:
        return (case.token_weights * (nll - 0.3 * entropy)).sum()

    (want,) = torch.autograd.grad(loss(exact_nll, expected), truth)
    (got,) = case.with_small_blocks(lambda: torch.autograd.grad(loss(nll, metrics.entropy), x))
    torch.testing.assert_close(got, want, **TIGHT)
    z = case.options.get("logit_scale", 1.0) * case.logits.detach()
    if (cap := case.options.get("softcap")) is not None:
        z = cap * torch.tanh(z / cap)
    torch.testing.assert_close(metrics.lse, torch.where(case.valid, z.logsumexp(-1), 0), **TIGHT)
    assert metrics.mean_logit is not None
    torch.testing.assert_close(metrics.mean_logit, torch.where(case.valid, z.mean(-1), 0), **TIGHT)
    # Two are equal where the cap is reached, and rounding has the say.
    predicted = z.gather(-1, metrics.prediction.long()[..., None])[..., 0]
    torch.testing.assert_close(predicted[case.valid], z.amax(-1)[case.valid], **TIGHT)
    assert not metrics.prediction[~case.valid].any()


# What comes with it ------------------------------------------------------------------------------------


@with_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.usefixtures("rows_at_a_time")
def test_predictions_are_the_first_of_equals(backend: str, dtype: torch.dtype) -> None:
    """Wherever a row begins in memory, and wherever vectors and blocks of it end."""
    g = torch.Generator().manual_seed(0)
    for v in (1, 15, 61):
        x = torch.randint(-2, 2, (2, 5, v), generator=g).to(dtype)
        x[0, 0] = 0
        x[0, 1] = torch.tensor(1.0).where(torch.arange(v) >= v // 2, -torch.inf)
        x[0, 2], x[0, 3], x[0, 4] = torch.arange(v), -torch.arange(v), torch.randperm(v, generator=g)
        labels = x.argmax(-1)
        labels[1, :2] = (labels[1, :2] + 1) % v
        labels[1, 4] = IGNORED
        expected = x.argmax(-1).masked_fill(labels == IGNORED, 0)
        for name, same in layouts(x).items():
            _, metrics = token_nll(same, labels, return_metrics=True, backend=backend)
            assert metrics.prediction.dtype == torch.int64
            assert torch.equal(metrics.prediction, expected), (v, name)
            assert torch.equal(metrics.correct, x.argmax(-1) == labels), (v, name)


@with_backend
@pytest.mark.parametrize("ignore_index", [IGNORED, 0])
def test_all_metrics(backend: str, ignore_index: int) -> None:
    p = make_problem()
    labels = torch.where(p.valid, p.labels.clamp(min=1), ignore_index)
    x = p.logits.detach().requires_grad_()
    options: Any = {"return_metrics": True, "backend": backend, "ignore_index": ignore_index}
    assert token_nll(x, labels, **options)[1].mean_logit is None
    options["mean_logit"] = True
    nll, metrics = token_nll(x, labels, **options)
    assert torch.equal(metrics.correct, (x.argmax(-1) == labels) & p.valid)
    assert torch.equal(metrics.prediction, x.argmax(-1).where(p.valid, 0))
    torch.testing.assert_close(metrics.lse, x.detach().logsumexp(-1).where(p.valid, 0), **TIGHT)
    torch.testing.assert_close(metrics.entropy, p.exact_entropy(x), **TIGHT)
    torch.testing.assert_close(metrics.mean_logit, x.detach().mean(-1).where(p.valid, 0), **TIGHT)
    assert [t.requires_grad for t in (nll, *metrics)] == [True, False, False, True, False, False]
    _, from_hidden = linear_token_nll(p.hidden, p.weight, labels, p.bias, **options)
    torch.testing.assert_close(from_hidden, TokenMetrics(*(t.detach() for t in metrics)))


def test_the_mean_of_logits_is_one_of_the_metrics() -> None:
    p = make_problem()
    with pytest.raises(ValueError, match="mean_logit is one of the metrics: it needs return_metrics=True"):
        token_nll(p.logits, p.labels, mean_logit=True)  # type: ignore[call-overload]


@with_backend
@pytest.mark.parametrize("offset", [0, 1e4])
def test_the_mean_of_logits_keeps_its_digits(backend: str, offset: float) -> None:
    x = torch.randn(8, 1000, generator=torch.Generator().manual_seed(0)) + offset
    labels, exact = torch.arange(8), x.double().mean(-1)
    _, metrics = token_nll(x, labels, return_metrics=True, mean_logit=True, backend=backend)
    assert metrics.mean_logit is not None
    rounding = torch.finfo(x.dtype).eps * x.abs().max()
    assert (metrics.mean_logit - exact).abs().max() <= rounding


# Accuracy ----------------------------------------------------------------------------------------------


@with_fused
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("spread", "offset"), [(1, 0), (6, 0), (20, 0), (0.1, 1000), (1, -1e4)])
@pytest.mark.usefixtures("rounding_to_nearest")
def test_as_accurate_as_eager(backend: str, dtype: torch.dtype, spread: float, offset: float) -> None:
    g = torch.Generator().manual_seed(0)
    logits = (spread * torch.randn(64, 1999, generator=g) + offset).to(dtype)
    labels, weight = torch.zeros(64, dtype=torch.int64), torch.randn(64, generator=g)

    def eager(x: Tensor) -> Tensor:
        log_p = torch.log_softmax(x, -1)
        return -(log_p.exp() * log_p).sum(-1)

    def ours(x: Tensor) -> Tensor:
        return token_nll(x, labels, return_metrics=True, backend=backend)[1].entropy

    truth = with_gradient(eager, logits.double(), weight.double())
    found = with_gradient(lambda x: eager(x.float()), logits, weight)
    got = with_gradient(ours, logits, weight)
    if truth[0].std() < 1e-9:  # all logits are equal in this dtype: the gradient is 0
        assert got[1].abs().max() <= found[1].abs().max()
        return
    assert_no_worse(got, found, truth, NO_WORSE[backend])


# Edges -------------------------------------------------------------------------------------------------


@with_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_masked_classes_have_no_part_in_it(backend: str, dtype: torch.dtype) -> None:
    """Nor have those whose probability is 0 in this dtype."""
    p = make_problem(dtype=dtype, ignored=0)
    masked = torch.rand(p.logits.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    masked[torch.arange(len(p.labels)), p.labels] = False
    masked[0] = torch.arange(61) != p.labels[0]  # one class is left
    rest = p.logits.double().masked_fill(masked, -1e4)
    truth, (expected,) = gradients(exact(p, (1.0, 0.5)), rest)
    tight = TIGHT if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-6}
    for hidden in (-torch.inf, -1e4):
        logits = p.logits.masked_fill(masked, hidden)
        value, (grad,) = gradients(from_logits(p, (1.0, 0.5), backend=backend), logits)
        torch.testing.assert_close(value.double(), truth, **tight)
        torch.testing.assert_close(grad.double(), expected.masked_fill(masked, 0), **tight)
        assert not grad[masked].any()


@with_backend
@pytest.mark.usefixtures("device_kind")
@pytest.mark.parametrize("junk", [torch.nan, torch.inf, -torch.inf])
def test_ignored_rows_may_hold_anything(backend: str, junk: float) -> None:
    p = make_problem()
    logits = p.logits
    logits[~p.valid] = junk
    weights = 0.0, 1.0
    _, metrics = token_nll(logits, p.labels, return_metrics=True, backend=backend)
    assert not any(t[~p.valid].any() for t in metrics if t is not None)
    expected = gradients(exact(p, weights), p.logits)
    torch.testing.assert_close(gradients(from_logits(p, weights, backend=backend), logits), expected, **TIGHT)


@with_fused
def test_a_bad_label_shows_where_it_cannot_be_looked_for(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunked.devices, "can_look", lambda _: False)
    p = make_problem(ignored=0)
    p.labels[4] = 10**9
    _, (grad,) = gradients(from_logits(p, (0.0, 1.0), backend=backend), p.logits)
    assert grad.isnan().any(-1).nonzero().tolist() == [[4]]


@with_backend
@pytest.mark.filterwarnings("ignore:All-NaN slice")  # says NumPy, which interprets the kernels
def test_bad_logits_show(backend: str) -> None:
    p = make_problem(ignored=0)
    logits = p.logits
    logits[3, 5], logits[5], logits[7] = torch.nan, torch.nan, torch.inf
    _, metrics = token_nll(logits, p.labels, return_metrics=True, backend=backend)
    _, (grad,) = gradients(from_logits(p, (0.0, 1.0), backend=backend), logits)
    assert metrics.entropy.isnan().nonzero().tolist() == [[3], [5], [7]]
    assert grad.isnan().any(-1).nonzero().tolist() == [[3], [5], [7]]
    assert ((metrics.prediction >= 0) & (metrics.prediction < 61)).all()


# As PyTorch uses it ------------------------------------------------------------------------------------


@with_fused
@pytest.mark.parametrize("path", ["logits", "linear"])
def test_a_gradient_of_losses_alone_is_that_without_metrics(
    backend: str, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit where norm has them, and by the same call of the backend: no entropies reach it."""
    p = make_problem(dtype=torch.float32)
    module: Any = {"chunked": chunked, "triton": triton}[backend]
    calls: list[object] = []
    run = module.token_nll_backward

    def spy(*args: Any, **kwargs: Any) -> None:
        calls.append(kwargs.get("of_entropy", args[7] if len(args) > 7 else None))
        run(*args, **kwargs)

    monkeypatch.setattr(module, "token_nll_backward", spy)
    inputs = (p.logits,) if path == "logits" else (p.hidden, p.weight, p.bias)
    function: Any = from_logits if path == "logits" else from_head
    got = gradients(function(p, (1.0, 0.0), backend=backend), *inputs)
    assert calls
    assert not any(calls)

    def without(*inputs: Tensor) -> Tensor:
        if path == "logits":
            return combined(p, (1.0, 0.0), token_nll(*inputs, p.labels, backend=backend), inputs[0])
        h, w, b = inputs
        return combined(p, (1.0, 0.0), linear_token_nll(h, w, p.labels, b, backend=backend), h)

    for a, b in zip(got[1], gradients(without, *inputs)[1], strict=True):
        assert torch.equal(a, b)


@with_fused
@pytest.mark.parametrize("saved", [False, True])
def test_what_is_saved(backend: str, saved: bool) -> None:
    """Entropies only if they were asked for."""
    p = make_problem()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (kept.append(x), x)[1], lambda x: x):
        token_nll(p.logits.requires_grad_(), p.labels, return_metrics=saved, backend=backend)
    sizes = sorted(t.numel() for t in kept)
    assert sizes == [23, *([23] if saved else []), 2 * 23, 23 * 61]


@with_fused
@with_weights
def test_in_place(backend: str, weights: Weights) -> None:
    p = make_problem()
    leaf = p.logits.detach().requires_grad_()
    logits = 2 * leaf
    memory = logits.data_ptr()
    loss = from_logits(p, weights, backend=backend, inplace_backward=True)(logits)
    got: list[Tensor] = []
    logits.register_hook(got.append)  # type: ignore[no-untyped-call]
    loss.backward()  # type: ignore[no-untyped-call]
    assert got[0].data_ptr() == memory
    _, (expected,) = gradients(exact(p, weights), 2 * p.logits)
    torch.testing.assert_close(got[0], expected, **TIGHT)


@with_fused
@with_weights
@pytest.mark.parametrize("way", ["registered", "compiled", "checkpointed"])
def test_other_ways(backend: str, weights: Weights, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    p = make_problem()
    options = {"backend": backend, **OPTIONS["all"]}
    head = p.hidden, p.weight, p.bias
    if way == "registered":
        monkeypatch.setattr(operator, "is_plain", lambda _: False)

    def run(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
        if way == "compiled":
            return torch.compile(f, fullgraph=True, backend="aot_eager")
        return f if way == "registered" else lambda *x: checkpoint(f, *x, use_reentrant=False)

    got = gradients(run(from_logits(p, weights, **options)), p.logits)
    torch.testing.assert_close(got, gradients(exact(p, weights, **OPTIONS["all"]), p.logits), **TIGHT)
    got = gradients(run(from_head(p, weights, **options)), *head)
    torch.testing.assert_close(got, gradients(exact_of_head(p, weights, **OPTIONS["all"]), *head), **TIGHT)


@with_backend
def test_autocast(backend: str) -> None:
    """Inputs are cast as for `linear`; the rest is in float32."""
    p = make_problem(dtype=torch.float32)
    head = p.hidden, p.weight, p.bias
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = gradients(from_head(p, (1.0, 0.5), backend=backend), *head)
    cast = [x.bfloat16() for x in head]
    expected = gradients(from_head(p, (1.0, 0.5), backend=backend), *cast)
    assert got[0].dtype == torch.float32
    torch.testing.assert_close(got[0], expected[0])
    for a, b in zip(got[1], expected[1], strict=True):
        torch.testing.assert_close(a, b.float())


@with_fused
def test_batches_of_gradients(backend: str) -> None:
    p = make_problem(n=4, v=5, ignored=0)
    x = p.logits.detach().requires_grad_()
    _, metrics = token_nll(x, p.labels, return_metrics=True, backend=backend)
    (got,) = torch.autograd.grad(metrics.entropy, x, torch.eye(4, dtype=torch.float64), is_grads_batched=True)
    expected = torch.autograd.functional.jacobian(p.exact_entropy, p.logits)
    torch.testing.assert_close(got, expected, **TIGHT)


@with_fused
def test_second_derivatives_are_refused(backend: str) -> None:
    p = make_problem()
    x = p.logits.detach().requires_grad_()
    _, metrics = token_nll(x, p.labels, return_metrics=True, backend=backend)
    (grad,) = torch.autograd.grad(metrics.entropy.sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match='use backend="reference" for second derivatives'):
        grad.sum().backward()


def test_chunks_take_their_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Entropies of many chunks, from hidden states some of which have no label."""
    monkeypatch.setattr(linear, "chunk_rows", lambda *_: 3)
    p = make_problem()
    head = p.hidden, p.weight, p.bias
    expected = gradients(exact_of_head(p, (0.0, 1.0)), *head)
    torch.testing.assert_close(gradients(from_head(p, (0.0, 1.0)), *head), expected, **TIGHT)
