"""Weights of classes, against float64 autograd of the definition and against PyTorch's cross-entropy."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nvamp import LinearLoss, Loss
from nvamp.distributed import map_gradient
from nvamp.engine import devices, linear_nll_sum, operator, parts
from nvamp.engine.options import Head, Options
from nvamp.functional import linear_token_nll, token_nll
from nvamp.objectives import NVAMP, CrossEntropy, Tail
from tests.engine.conftest import at_a_time
from tests.engine.problems import (
    DTYPES,
    IGNORED,
    OPTIONS,
    Problem,
    assert_no_worse,
    gradients,
    make_problem,
    with_gradient,
)
from tests.engine.test_engine import NO_WORSE, TIGHT, extra_weights, with_backend, with_fused
from tests.engine.test_parts import SIZES, on_ranks

with_options = pytest.mark.parametrize("options", [OPTIONS[name] for name in ("plain", "z_loss", "all")])


@pytest.fixture
def seven_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    at_a_time(7, monkeypatch)


def weights(v: int = 61, dtype: torch.dtype = torch.float64) -> Tensor:
    """Of the classes: some of them 0, and not 1 on average."""
    w = 3 * torch.rand(v, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return torch.where(w < 0.5, 0, w).to(dtype)


def combined(p: Problem, nll: Tensor, entropy: Tensor) -> Tensor:
    return (p.token_weights * nll).sum() - 0.7 * (p.token_weights.flip(0) * entropy).sum()


def exact(p: Problem, **options: Any) -> Callable[[Tensor], Tensor]:
    return lambda x: combined(p, p.exact(x, **options), p.exact_entropy(x, **options))


@with_options
@with_backend
@pytest.mark.usefixtures("device_kind", "seven_rows")
def test_both_paths(backend: str, options: dict[str, Any]) -> None:
    """Losses, and the gradient of losses and entropies with any weights."""
    p = make_problem(n=11, v=35)
    head = p.hidden, p.weight, p.bias
    options = {"class_weight": weights(35), **options}

    def ours(function: Any, *inputs: Tensor) -> Tensor:
        nll, metrics = function(*inputs, return_metrics=True, backend=backend, **options)
        return combined(p, nll, metrics.entropy)

    nll = token_nll(p.logits, p.labels, backend=backend, **options)
    torch.testing.assert_close(nll, p.exact(p.logits, **options), **TIGHT)
    expected = gradients(exact(p, **options), p.logits)
    torch.testing.assert_close(gradients(lambda x: ours(token_nll, x, p.labels), p.logits), expected, **TIGHT)
    expected = gradients(lambda h, w, b: exact(p, **options)(F.linear(h, w, b)), *head)
    got = gradients(lambda h, w, b: ours(linear_token_nll, h, w, p.labels, b), *head)
    torch.testing.assert_close(got, expected, **TIGHT)


@with_options
@with_fused
@pytest.mark.parametrize("few", [0, 1, 3])
@pytest.mark.usefixtures("device_kind", "seven_rows")
def test_one_pass(few: int, backend: str, options: dict[str, Any]) -> None:
    p = make_problem(n=11, v=35)
    head, options = (p.hidden, p.weight, p.bias), {"class_weight": weights(35), **options}
    extra = extra_weights(torch.where(p.valid, p.exact(p.logits, **options), -torch.inf), few)

    def weighted(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return ((0.3 + extra) * p.exact(F.linear(h, w, b), **options)).sum()

    def ours(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        total, nll = linear_nll_sum(h, w, p.labels, b, few=few, backend=backend, **options)
        return 0.3 * total + (extra * nll).sum()

    torch.testing.assert_close(gradients(ours, *head), gradients(weighted, *head), **TIGHT)


@with_options
@with_backend
@pytest.mark.usefixtures("device_kind", "seven_rows")
def test_a_vocabulary_in_parts(backend: str, options: dict[str, Any]) -> None:
    """`"triton"` is not asked for what it does not have: see `test_both_paths`."""
    p = make_problem(n=11, v=sum(SIZES))
    class_weight = weights(sum(SIZES))
    backend = "chunked" if backend == "triton" and "label_smoothing" in options else backend
    options = {"class_weight": class_weight, **options}
    opt = Options(IGNORED, **options)
    pieces = [x.split(SIZES, -1 - (x is p.weight)) for x in (p.logits, p.weight, p.bias)]

    def rank(ranks: Any) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        logits, weight, bias = (piece[ranks.rank] for piece in pieces)

        def of_logits(x: Tensor) -> Tensor:
            nll, _, entropy, _ = parts.token_nll(x, p.labels, 2, False, backend, opt, ranks)
            torch.testing.assert_close(nll, p.exact(p.logits, **options), **TIGHT)
            return combined(p, nll, entropy)

        def of_head(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
            head = Head(map_gradient(h, ranks.total), w, b, p.labels)
            nll, _, entropy, _ = parts.linear_token_nll(head, 2, None, backend, opt, ranks)
            return combined(p, nll, entropy)

        value, by_logits = gradients(of_logits, logits)
        return value, by_logits, gradients(of_head, p.hidden, weight, bias)[1]

    value, (by_logits,) = gradients(exact(p, **options), p.logits)
    _, by_head = gradients(lambda h, w, b: exact(p, **options)(F.linear(h, w, b)), p.hidden, p.weight, p.bias)
    results = on_ranks(len(SIZES), rank)
    for got, _, (by_hidden, _, _) in results:
        torch.testing.assert_close(got, value, **TIGHT)
        torch.testing.assert_close(by_hidden, by_head[0], **TIGHT)
    torch.testing.assert_close(torch.cat([r[1][0] for r in results], -1), by_logits, **TIGHT)
    for i in (1, 2):
        torch.testing.assert_close(torch.cat([r[2][i] for r in results]), by_head[i], **TIGHT)


@pytest.mark.parametrize("dtype", DTYPES[:-1], ids=str)
@pytest.mark.parametrize(("backend", "label_smoothing"), [("chunked", 0), ("chunked", 0.1), ("triton", 0)])
@pytest.mark.usefixtures("rounding_to_nearest")
def test_as_accurate_as_pytorch(backend: str, dtype: torch.dtype, label_smoothing: float) -> None:
    n = 128 if backend == "chunked" else 64  # kernels are interpreted
    p = make_problem(n=n, d=32, v=1999, dtype=dtype, ignored=0)
    class_weight = weights(1999, torch.float32)

    def eager(x: Tensor) -> Tensor:
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        w = class_weight.to(wide)
        return F.cross_entropy(x.to(wide), p.labels, w, reduction="none", label_smoothing=label_smoothing)

    def ours(x: Tensor) -> Tensor:
        return token_nll(
            x, p.labels, class_weight=class_weight, label_smoothing=label_smoothing, backend=backend
        )

    truth = with_gradient(eager, p.logits.double(), p.token_weights.double())
    found = with_gradient(eager, p.logits, p.token_weights)
    assert_no_worse(with_gradient(ours, p.logits, p.token_weights), found, truth, NO_WORSE[backend])


@with_backend
@pytest.mark.parametrize("label_smoothing", [0, 0.1, 1])
@pytest.mark.parametrize("criterion", [Loss, LinearLoss])
def test_the_mean_over_weights_is_that_of_pytorch(
    criterion: Any, label_smoothing: float, backend: str
) -> None:
    """The value and the gradients, with the sum of weights as the number of items."""
    p, w = make_problem(), weights()
    head = p.hidden, p.weight
    loss = criterion(
        CrossEntropy(), shift=False, class_weight=w, label_smoothing=label_smoothing, backend=backend
    )
    items = w[p.labels[p.valid]].sum()

    def ours(h: Tensor, weight: Tensor) -> Tensor:
        inputs = (h @ weight.T, p.labels) if criterion is Loss else (h, weight, p.labels)
        result: Tensor = loss(*inputs, num_items_in_batch=items)
        return result

    expected = gradients(
        lambda h, weight: F.cross_entropy(h @ weight.T, p.labels, w, label_smoothing=label_smoothing), *head
    )
    torch.testing.assert_close(gradients(ours, *head), expected, **TIGHT)


@with_fused
@pytest.mark.parametrize("objective", [NVAMP(), NVAMP(gradient="token"), Tail(0.2)], ids=str)
def test_objectives_see_weighted_losses(objective: Any, backend: str) -> None:
    """Which of them are the largest too."""
    p, w = make_problem(), weights()

    def rebuilt(h: Tensor, weight: Tensor) -> Tensor:
        nll = p.exact(h @ weight.T, class_weight=w)
        loss: Tensor = Loss(objective, shift=False, backend="reference")(
            torch.stack((-nll, torch.log(-torch.expm1(-nll))), -1), torch.where(p.valid, 0, IGNORED)
        )
        return loss

    w = w.clamp(min=0.3)  # a loss of 0 is a logit of inf in a vocabulary of two
    loss = LinearLoss(objective, shift=False, class_weight=w, backend=backend)
    got = gradients(lambda h, weight: loss(h, weight, p.labels), p.hidden, p.weight)
    torch.testing.assert_close(got, gradients(rebuilt, p.hidden, p.weight), rtol=1e-7, atol=1e-9)


@with_fused
@pytest.mark.parametrize("way", ["registered", "compiled"])
def test_other_ways(backend: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    p, w = make_problem(), weights()
    if way == "registered":
        monkeypatch.setattr(operator, "is_plain", lambda _: False)
    options: Any = {"backend": backend, "class_weight": w, **OPTIONS["z_loss"]}

    def of_head(h: Tensor, weight: Tensor, b: Tensor) -> Tensor:
        total, _ = linear_nll_sum(h, weight, p.labels, b, few=0, **options)
        return total + (p.token_weights * linear_token_nll(h, weight, p.labels, b, **options)).sum()

    def definition(h: Tensor, weight: Tensor, b: Tensor) -> Tensor:
        nll = p.exact(F.linear(h, weight, b), class_weight=w, **OPTIONS["z_loss"])
        return ((1 + p.token_weights) * nll).sum()

    head = p.hidden, p.weight, p.bias
    run = torch.compile(of_head, fullgraph=True, backend="aot_eager") if way == "compiled" else of_head
    torch.testing.assert_close(gradients(run, *head), gradients(definition, *head), **TIGHT)


def test_autocast_and_a_change_before_the_backward() -> None:
    p, w = make_problem(dtype=torch.float32), weights(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = linear_token_nll(p.hidden, p.weight, p.labels, class_weight=w)
    expected = linear_token_nll(p.hidden.bfloat16(), p.weight.bfloat16(), p.labels, class_weight=w)
    assert torch.equal(got, expected)
    x = p.logits.requires_grad_()
    loss = token_nll(x, p.labels, class_weight=w).sum()
    w *= 2
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ([1.0, 2.0], r"class_weight must be a floating-point tensor or None, got \[1.0, 2.0\]"),
        (torch.ones(61).long(), "class_weight must be a floating-point tensor or None, got torch.int64"),
        (torch.ones(61, 1), r"class_weight must have shape \[vocabulary\], got \[61, 1\]"),
        (torch.ones(60), r"class_weight must have shape \[61\], .* got \[60\]"),
        (torch.ones(61, requires_grad=True), "class_weight must not require a gradient"),
        (torch.ones(61, device="meta"), "class_weight must be on the device of the labels, cpu, got meta"),
    ],
)
def test_what_does_not_fit_is_refused(wrong: Any, error: str) -> None:
    p = make_problem()
    for call in (
        lambda: token_nll(p.logits, p.labels, class_weight=wrong),
        lambda: LinearLoss(NVAMP(), class_weight=wrong, shift=False)(p.hidden, p.weight, p.labels),
    ):
        with pytest.raises((TypeError, ValueError), match=error):
            call()


@with_fused
def test_a_bad_label_shows_where_it_cannot_be_looked_for(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "can_look", lambda _: False)
    nll = token_nll(torch.zeros(3, 4), torch.tensor([0, 4, 3]), class_weight=torch.ones(4), backend=backend)
    assert nll.isnan().tolist() == [False, True, False]


def test_a_part_is_refused_if_the_whole_does_not_fit() -> None:
    p = make_problem(n=4, v=9)
    opt = Options(IGNORED, class_weight=torch.ones(4, dtype=torch.float64))

    def rank(ranks: Any) -> Any:
        part = p.logits.split([4, 5], -1)[ranks.rank]
        return parts.token_nll(part, p.labels, 0, False, "chunked", opt, ranks)

    for error in on_ranks(2, rank):
        assert "class_weight must have shape [9]" in str(error)


def test_it_moves_with_its_criterion_and_is_not_saved() -> None:
    criterion = Loss(CrossEntropy(), class_weight=weights())
    assert criterion.float().class_weight.dtype == torch.float32  # type: ignore[union-attr]
    assert not criterion.state_dict()
    criterion.class_weight = None
    criterion.class_weight = weights()
    assert criterion.double().class_weight is not None
    assert "class_weight" in dict(criterion.named_buffers())
    assert "class_weight=tensor(" in repr(criterion)
