"""A vocabulary in parts against the whole: ranks that are threads of this process, one running at a time."""

import threading
from collections.abc import Callable
from typing import Any, TypeVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nvamp.distributed import map_gradient
from nvamp.engine import parts
from nvamp.engine.checks import check_head
from nvamp.engine.checks import check_logits as check_of_logits
from nvamp.engine.options import Head, Options
from nvamp.functional import token_nll
from nvamp.ranks import ALONE, Ranks
from tests import oracle
from tests.engine.problems import (
    HALF,
    IGNORED,
    OPTIONS,
    Problem,
    assert_no_worse,
    gradients,
    make_problem,
    with_gradient,
)
from tests.strategies import examples

T = TypeVar("T")
SIZES = [1, 30, 0, 9]
TIGHT = {"rtol": 1e-10, "atol": 1e-12}
with_options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
with_backend = pytest.mark.parametrize("backend", ["reference", "chunked", "triton"])


def on_ranks(world: int, function: Callable[[Ranks], T]) -> list[T]:
    """What function(ranks) gives on each of them. They take turns: Triton's interpreter is for one thread."""
    turn, barrier = threading.Lock(), threading.Barrier(world, timeout=60)
    slots: list[Any] = [None] * world
    results: list[Any] = [None] * world

    def exchange(rank: int, x: Tensor) -> Tensor:
        slots[rank] = x.detach().clone()
        turn.release()
        barrier.wait()
        everything = torch.stack(slots)
        barrier.wait()
        turn.acquire()
        return everything

    def run(rank: int) -> None:
        with turn:
            try:
                results[rank] = function(
                    Ranks(
                        rank,
                        world,
                        gather=lambda x: exchange(rank, x),
                        total=lambda x: exchange(rank, x).sum(0),
                        maximum=lambda x: exchange(rank, x).amax(0),
                    )
                )
            except Exception as error:
                results[rank] = error
                if not isinstance(error, ValueError):  # which all ranks raise
                    barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    errors = [result for result in results if isinstance(result, Exception)]
    unexpected = [e for e in errors if not isinstance(e, ValueError | threading.BrokenBarrierError)]
    if unexpected:
        raise unexpected[0]
    return results


def options_of(options: dict[str, Any]) -> Options:
    return Options(IGNORED, **options)


def logits_path(
    p: Problem, sizes: list[int], backend: str, options: dict[str, Any]
) -> list[tuple[Tensor, Tensor]]:
    """Losses, and the gradient of Σ token_weights·nll by the part's logits, on every rank."""
    shards = p.logits.split(sizes, -1)

    def rank(ranks: Ranks) -> tuple[Tensor, Tensor]:
        x = shards[ranks.rank].detach().clone().requires_grad_()
        nll = parts.token_nll(x, p.labels, 0, False, backend, options_of(options), ranks)[0]
        (grad,) = torch.autograd.grad((p.token_weights * nll).sum(), x)
        return nll.detach(), grad

    return on_ranks(len(sizes), rank)


def problem() -> Problem:
    """Its labels have the first and the last class of a part among them."""
    p = make_problem(n=11, v=sum(SIZES))
    p.labels[:4] = torch.tensor([0, 1, 30, 31])
    return p


def check_logits(backend: str, options: dict[str, Any]) -> None:
    p = problem()
    _, (expected,) = gradients(lambda x: (p.token_weights * p.exact(x, **options)).sum(), p.logits)
    results = logits_path(p, SIZES, backend, options)
    for nll, _ in results:
        torch.testing.assert_close(nll, p.exact(p.logits, **options), **TIGHT)
    torch.testing.assert_close(torch.cat([grad for _, grad in results], -1), expected, **TIGHT)


def check_linear(backend: str, options: dict[str, Any]) -> None:
    p = problem()

    def whole(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return (p.token_weights * p.exact(torch.nn.functional.linear(h, w, b), **options)).sum()

    _, expected = gradients(whole, p.hidden, p.weight, p.bias)
    weights, biases = p.weight.split(SIZES), p.bias.split(SIZES)

    def rank(ranks: Ranks) -> list[Tensor]:
        def loss(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
            head = Head(map_gradient(h, ranks.total), w, b, p.labels)
            nll = parts.linear_token_nll(head, 0, None, backend, options_of(options), ranks)[0]
            torch.testing.assert_close(nll, p.exact(p.logits, **options), **TIGHT)
            return (p.token_weights * nll).sum()

        return gradients(loss, p.hidden, weights[ranks.rank], biases[ranks.rank])[1]

    results = on_ranks(len(SIZES), rank)
    for hidden, _, _ in results:
        torch.testing.assert_close(hidden, expected[0], **TIGHT)
    for i in (1, 2):
        torch.testing.assert_close(torch.cat([grads[i] for grads in results]), expected[i], **TIGHT)


@with_options
@with_backend
@pytest.mark.parametrize("check", [check_logits, check_linear])
def test_options(check: Callable[..., None], backend: str, options: dict[str, Any]) -> None:
    check(backend, options)


@with_backend
@pytest.mark.parametrize("check", [check_logits, check_linear])
@pytest.mark.usefixtures("setting")
def test_blocks_chunks_and_devices(check: Callable[..., None], backend: str) -> None:
    check(backend, OPTIONS["all"])


@with_options
@pytest.mark.parametrize("dtype", [*HALF, torch.float32], ids=str)
@pytest.mark.parametrize(("backend", "factor"), [("chunked", 1.1), ("triton", 1.25)])
@pytest.mark.usefixtures("rounding_to_nearest")
def test_error_is_that_of_eager_on_the_whole(
    backend: str, factor: float, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    p = make_problem(n=40, v=301, dtype=dtype)
    p.hidden *= 8
    exact = p.exact(p.logits, **options)
    _, (true_grad,) = gradients(
        lambda x: (p.token_weights.double() * p.exact(x, **options)).sum(), p.logits.double()
    )

    def eager(x: Tensor) -> Tensor:
        return token_nll(x, p.labels, backend="reference", **options)

    _, (grad,) = gradients(lambda x: (p.token_weights * eager(x)).sum(), p.logits)
    results = logits_path(p, [100, 1, 200], backend, options)
    got = torch.cat([grad for _, grad in results], -1)
    rounding = torch.finfo(torch.float32).eps
    limit = max(factor * oracle.relative_error(grad, true_grad), rounding)
    assert oracle.relative_error(got, true_grad) <= limit
    limit = max(factor * oracle.relative_error(eager(p.logits), exact), rounding)
    assert all(oracle.relative_error(nll, exact) <= limit for nll, _ in results)


@with_backend
@pytest.mark.usefixtures("device_kind")
def test_masked_classes_and_extreme_logits(backend: str) -> None:
    p = make_problem(n=6, v=8, ignored=0)
    p.labels[:] = torch.tensor([0, 7, 3, 4, 0, 1])
    logits = torch.randn(6, 8, dtype=torch.float64)
    logits[0, 4:] = -torch.inf  # a part without any mass
    logits[1, :4] = -torch.inf
    logits[2, 5] = torch.nan
    logits[3, 0] = torch.inf
    logits[4] = -torch.inf
    logits[5, 6] = 1e4

    def rank(ranks: Ranks) -> tuple[Tensor, Tensor]:
        x = logits.split(4, -1)[ranks.rank].clone().requires_grad_()
        nll = parts.token_nll(x, p.labels, 0, False, backend, Options(), ranks)[0]
        (grad,) = torch.autograd.grad(nll.sum(), x)
        return nll.detach(), grad

    _, (grad,) = gradients(lambda x: token_nll(x, p.labels, backend="chunked").sum(), logits)
    results = on_ranks(2, rank)
    whole = token_nll(logits, p.labels, backend="chunked")
    assert whole.isnan().tolist() == [False, False, True, True, True, False]
    for nll, _ in results:
        torch.testing.assert_close(nll, whole, equal_nan=True, **TIGHT)
    got = torch.cat([g for _, g in results], -1)
    finite = torch.tensor([0, 1, 5])
    torch.testing.assert_close(got[finite], grad[finite], **TIGHT)
    assert got[2:5].isnan().any(-1).all()


def test_a_part_may_be_empty() -> None:
    check_of_logits(torch.zeros(3, 0), part=True)
    check_head(torch.zeros(3, 2), torch.zeros(0, 2), torch.zeros(0), part=True)


@pytest.mark.parametrize("backend", ["chunked", "triton"])
def test_logits_saved_through_hooks_are_not_overwritten(backend: str) -> None:
    """Autograd would not notice that they have changed, and their base is unknown."""
    p = make_problem(n=5, v=7)
    leaf = p.logits.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        nll = parts.token_nll(leaf.view_as(leaf), p.labels, 0, True, backend, Options(), ALONE)[0]
    nll.sum().backward()
    assert torch.equal(leaf, p.logits)


def losses(logits: Tensor, labels: Tensor, sizes: list[int], backend: str, opt: Options) -> list[Tensor]:
    """Those of every rank."""
    shards = logits.split(sizes, -1)
    return on_ranks(
        len(sizes),
        lambda ranks: parts.token_nll(shards[ranks.rank], labels, 0, False, backend, opt, ranks)[0],
    )


@with_backend
@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_label_smoothing_keeps_its_digits(backend: str, offset: float) -> None:
    """What all logits have in common is not added up, neither over the classes of a part nor over the parts."""
    x = torch.randn(8, 1000, generator=torch.Generator().manual_seed(0)) + offset
    x[:, :400] -= 50
    labels = torch.arange(400, 408)

    def smoothed(x: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(x, labels, label_smoothing=0.1, reduction="none")

    exact = smoothed(x.double())
    for nll in losses(x, labels, [400, 0, 600], backend, Options(IGNORED, label_smoothing=0.1)):
        assert oracle.relative_error(nll, exact) <= 1.1 * oracle.relative_error(smoothed(x), exact)


@with_backend
@pytest.mark.parametrize("label_smoothing", [0.1, 0.5, 0.9])
def test_smoothing_over_a_masked_class_has_an_infinite_loss(backend: str, label_smoothing: float) -> None:
    logits = torch.tensor(
        [[0.0, 1.0, 2.0, -torch.inf], [-torch.inf, -torch.inf, 2.0, 3.0], [0.0, 1.0, 2.0, 3.0]]
    )
    for label in range(4):
        labels = torch.full((3,), label)
        for nll in losses(logits, labels, [2, 2], backend, Options(IGNORED, label_smoothing)):
            assert nll.isinf().tolist() == [True, True, False]


@with_backend
@pytest.mark.parametrize("ignore_index", [-100, 0, 5])
def test_ignored_rows_may_hold_anything(backend: str, ignore_index: int) -> None:
    p = make_problem(n=8, v=10)
    labels = torch.tensor([1, ignore_index, 9, 3, ignore_index, 6, 2, 8])
    logits = p.logits.detach().clone()
    logits[1], logits[4] = torch.nan, torch.inf
    opt = Options(ignore_index, label_smoothing=0.1)

    def rank(ranks: Ranks) -> tuple[Tensor, Tensor]:
        x = logits.split([7, 3], -1)[ranks.rank].clone().requires_grad_()
        nll = parts.token_nll(x, labels, 0, False, backend, opt, ranks)[0]
        (grad,) = torch.autograd.grad(nll.sum(), x)
        return nll.detach(), grad

    results = on_ranks(2, rank)
    valid = labels != ignore_index
    expected = oracle.token_losses(logits[valid], labels[valid], label_smoothing=0.1)
    for nll, grad in results:
        torch.testing.assert_close(nll[valid], expected, **TIGHT)
        assert not nll[~valid].any()
        assert not grad[~valid].any()
        assert grad[valid].any(-1).all()


@with_backend
@pytest.mark.usefixtures("device_kind")
def test_labels_out_of_range(backend: str, device_kind: str) -> None:
    """An error on all ranks where a look costs nothing, NaN elsewhere."""
    p = make_problem(n=5, v=9, ignored=0)
    p.labels[2] = 9
    if device_kind == "CPU":
        errors: list[Any] = on_ranks(
            2,
            lambda ranks: parts.token_nll(
                p.logits.split([4, 5], -1)[ranks.rank], p.labels, 0, False, backend, Options(), ranks
            ),
        )
        assert all("labels must be in [0, 9) for a vocabulary of 9" in str(e) for e in errors)
        assert all(isinstance(e, ValueError) for e in errors)
        return
    for nll, grad in logits_path(p, [4, 5], backend, {}):
        assert nll.isnan().tolist() == [False, False, True, False, False]
        if backend != "reference":
            assert grad.isnan().any(-1).tolist() == [False, False, True, False, False]


@given(data=st.data())
@examples(30)
@pytest.mark.parametrize("backend", ["chunked", "triton"])
def test_any_parts_are_the_whole(backend: str, data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(any))
    n = data.draw(st.integers(0, 7))
    p = make_problem(n=n, d=3, v=sum(sizes), seed=data.draw(st.integers(0, 99)))
    options = data.draw(st.sampled_from(list(OPTIONS.values())))
    _, (expected,) = gradients(lambda x: (p.token_weights * p.exact(x, **options)).sum(), p.logits)
    results = logits_path(p, sizes, backend, options)
    for nll, _ in results:
        torch.testing.assert_close(nll, p.exact(p.logits, **options), **TIGHT)
    torch.testing.assert_close(torch.cat([grad for _, grad in results], -1), expected, **TIGHT)


# Metrics ----------------------------------------------------------------------------------------------


def combined(p: Problem, nll: Tensor, entropy: Tensor) -> Tensor:
    return (p.token_weights * nll).sum() - 0.7 * (p.token_weights.flip(0) * entropy).sum()


def check_metrics(p: Problem, sizes: list[int], backend: str, options: dict[str, Any]) -> None:
    """Losses, log-sum-exps, entropies, predictions, and the gradient of losses and entropies, on every rank."""
    shards = p.logits.split(sizes, -1)

    def rank(ranks: Ranks) -> tuple[Tensor, ...]:
        x = shards[ranks.rank].detach().clone().requires_grad_()
        results = parts.token_nll(x, p.labels, 3, False, backend, options_of(options), ranks)
        assert [t.requires_grad for t in results] == [True, False, True, False, False]
        nll, _, entropy, *_ = results
        (grad,) = torch.autograd.grad(combined(p, nll, entropy), x)
        return *(t.detach() for t in results), grad

    _, (expected,) = gradients(
        lambda x: combined(p, p.exact(x, **options), p.exact_entropy(x, **options)), p.logits
    )
    results = on_ranks(len(sizes), rank)
    whole = {"backend": "reference", "return_metrics": True, "mean_logit": True, **options}
    nll, metrics = token_nll(p.logits, p.labels, **whole)  # type: ignore[call-overload]
    for got_nll, lse, entropy, prediction, mean, _ in results:
        torch.testing.assert_close(got_nll, nll, **TIGHT)
        torch.testing.assert_close(lse[p.valid], metrics.lse[p.valid], **TIGHT)
        torch.testing.assert_close(entropy, p.exact_entropy(p.logits, **options), **TIGHT)
        assert torch.equal(prediction, metrics.prediction)
        torch.testing.assert_close(mean, metrics.mean_logit, **TIGHT)
    torch.testing.assert_close(torch.cat([grad for *_, grad in results], -1), expected, **TIGHT)


def check_linear_metrics(p: Problem, sizes: list[int], backend: str, options: dict[str, Any]) -> None:
    weights, biases = p.weight.split(sizes), p.bias.split(sizes)

    def whole(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        x = torch.nn.functional.linear(h, w, b)
        return combined(p, p.exact(x, **options), p.exact_entropy(x, **options))

    _, expected = gradients(whole, p.hidden, p.weight, p.bias)
    metrics = token_nll(p.logits, p.labels, return_metrics=True, mean_logit=True, **options)[1]  # type: ignore[call-overload]
    mean_logits = metrics.mean_logit

    def rank(ranks: Ranks) -> list[Tensor]:
        def loss(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
            head = Head(map_gradient(h, ranks.total), w, b, p.labels)
            nll, _, entropy, _, mean = parts.linear_token_nll(
                head, 3, None, backend, options_of(options), ranks
            )
            torch.testing.assert_close(mean, mean_logits, **TIGHT)
            torch.testing.assert_close(entropy, p.exact_entropy(p.logits, **options), **TIGHT)
            return combined(p, nll, entropy)

        return gradients(loss, p.hidden, weights[ranks.rank], biases[ranks.rank])[1]

    results = on_ranks(len(sizes), rank)
    for hidden, _, _ in results:
        torch.testing.assert_close(hidden, expected[0], **TIGHT)
    for i in (1, 2):
        torch.testing.assert_close(torch.cat([grads[i] for grads in results]), expected[i], **TIGHT)


@with_options
@with_backend
@pytest.mark.parametrize("check", [check_metrics, check_linear_metrics])
@pytest.mark.usefixtures("setting")
def test_metrics(check: Callable[..., None], backend: str, options: dict[str, Any]) -> None:
    check(make_problem(n=11, v=sum(SIZES)), SIZES, backend, options)


@given(data=st.data())
@examples(15)
@with_backend
def test_metrics_of_any_parts(backend: str, data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(any))
    p = make_problem(n=data.draw(st.integers(0, 7)), d=3, v=sum(sizes), seed=data.draw(st.integers(0, 99)))
    check_metrics(p, sizes, backend, data.draw(st.sampled_from(list(OPTIONS.values()))))


@with_backend
def test_predictions_are_the_first_of_equals(backend: str) -> None:
    """Of several parts that have the largest z, that of the first."""
    x = torch.randint(-1, 1, (60, 6), generator=torch.Generator().manual_seed(0)).double()
    x[:3] = torch.tensor([[-torch.inf] * 5 + [0.0], [-torch.inf, -1, -1, -torch.inf, -1, -1], [1.0] * 6])
    x[3, 3] = torch.nan
    labels, shards = torch.zeros(60, dtype=torch.int64), x.split([2, 0, 3, 1], -1)
    found = on_ranks(
        4,
        lambda ranks: parts.token_nll(shards[ranks.rank], labels, 2, False, backend, Options(), ranks)[3],
    )
    for prediction in found:
        assert torch.equal(prediction[:3], torch.tensor([5, 1, 0]))
        assert 0 <= prediction[3] < 6
        assert torch.equal(prediction[4:], x[4:].argmax(-1))


@pytest.mark.parametrize(("backend", "factor"), [("chunked", 1.1), ("triton", 1.25)])
@pytest.mark.parametrize(("spread", "offset"), [(1, 0), (6, 0), (0.1, 0), (1, 1e4)])
def test_entropy_is_as_accurate_as_eager_on_the_whole(
    backend: str, factor: float, spread: float, offset: float
) -> None:
    g = torch.Generator().manual_seed(0)
    x = spread * torch.randn(32, 999, generator=g) + offset
    labels, weights = torch.zeros(32, dtype=torch.int64), torch.randn(32, generator=g)
    shards = x.split([300, 0, 1, 698], -1)

    def eager(x: Tensor) -> Tensor:
        log_p = torch.log_softmax(x, -1)
        return -(log_p.exp() * log_p).sum(-1)

    def rank(ranks: Ranks) -> tuple[Tensor, Tensor]:
        part = shards[ranks.rank].clone().requires_grad_()
        entropy = parts.token_nll(part, labels, 2, False, backend, Options(), ranks)[2]
        (grad,) = torch.autograd.grad((weights * entropy).sum(), part)
        return entropy.detach(), grad

    truth = with_gradient(eager, x.double(), weights.double())
    found = with_gradient(eager, x, weights)
    results = on_ranks(4, rank)
    grad = torch.cat([grad for _, grad in results], -1)
    for entropy, _ in results:
        assert_no_worse((entropy, grad), found, truth, factor)


@with_backend
@pytest.mark.usefixtures("device_kind")
def test_masked_classes_and_ignored_rows_have_no_part_in_metrics(backend: str) -> None:
    p = make_problem(n=6, v=8, ignored=0)
    p.labels[:] = torch.tensor([0, 7, IGNORED, 4, 0, 1])
    logits = p.logits.detach().clone()
    logits[0, 4:] = logits[1, :4] = -torch.inf  # a part without any mass
    logits[2] = torch.nan
    logits[3, [1, 6]] = -torch.inf
    finite = logits.where(logits.isfinite(), -1e4)
    _, (expected,) = gradients(lambda x: combined(p, p.exact(x), p.exact_entropy(x)), finite)

    def rank(ranks: Ranks) -> tuple[Tensor, Tensor, Tensor]:
        x = logits.split(4, -1)[ranks.rank].clone().requires_grad_()
        nll, _, entropy, prediction = parts.token_nll(x, p.labels, 2, False, backend, Options(), ranks)
        (grad,) = torch.autograd.grad(combined(p, nll, entropy), x)
        return entropy.detach(), prediction, grad

    results = on_ranks(2, rank)
    for entropy, prediction, _ in results:
        torch.testing.assert_close(entropy, p.exact_entropy(finite), **TIGHT)
        assert torch.equal(prediction, finite.argmax(-1).where(p.valid, 0))
    torch.testing.assert_close(torch.cat([grad for *_, grad in results], -1), expected, **TIGHT)
