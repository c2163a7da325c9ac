"""Properties of engine and losses, for anything that `tests.strategies` draws. `make fuzz` draws for an hour."""

from typing import Any

import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from nvamp.engine import linear_nll_sum
from nvamp.functional import linear_nvamp_loss, linear_token_nll, nvamp_loss, token_nll, token_weights
from nvamp.objectives import GRADIENTS, NVAMP, Gradient
from tests import oracle
from tests.strategies import BACKENDS, ITEMS, LOSS, Case, cases, examples, linear

FUSED = BACKENDS[1:]
DOUBLE = [torch.float64]
TIGHT = {"rtol": 1e-7, "atol": 1e-9}
PATHS = st.sampled_from(["logits", "linear"])
MODES = st.sampled_from(GRADIENTS)


def differentiated(loss: Any, *inputs: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The scalar loss(*inputs) and its gradients by the inputs, whose layout in memory stays what it is."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    value = loss(*leaves)
    return value.detach(), list(torch.autograd.grad(value, leaves))


# Against the definition ---------------------------------------------------------------------------------


class Bounds:
    """How far rounding may take a result from the definition: a generous multiple of what it takes at worst."""

    def __init__(self, c: Case, token_weights: Tensor, from_hidden: bool) -> None:
        exact = linear(*(x.double() for x in c.head)) if from_hidden else c.logits.double()
        dtype = c.hidden.dtype
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.eps = torch.finfo(dtype).eps
        scale = abs(c.options.get("logit_scale", 1.0))
        size = exact.abs()
        if from_hidden:
            size = linear(*(x.double().abs() for x in c.head))
        largest = scale * size.amax(-1) if size.numel() else size.new_zeros(c.labels.shape)
        # Of the logits z, and of their log-sum-exp.
        error = 16 * torch.finfo(wide).eps * (1 + largest) + (4 * self.eps * largest if from_hidden else 0)
        slope = 1 + 2 * c.options.get("z_loss", 0.0) * (1 + largest + 5)
        self.losses = 4 * error * slope
        z, cap = c.options.get("logit_scale", 1.0) * exact, c.options.get("softcap")
        z = z if cap is None else cap * torch.tanh(z / cap)
        spread = torch.softmax(z, -1) + 1 / exact.shape[-1]
        spread = spread.scatter_add(
            -1, c.labels.long().clamp(0, exact.shape[-1] - 1)[..., None], torch.ones_like(spread)
        )
        weights = token_weights.double().abs() * scale * slope * c.valid
        base = weights[..., None] * torch.where(c.valid[..., None], spread, 0)
        self.logits = 8 * (error[..., None] + self.eps) * base
        chunks = 4 + c.labels.numel() / c.rows
        of_sum = self.logits + chunks * self.eps * base
        flat = of_sum.flatten(0, 1)
        self.hidden = of_sum @ c.weight.double().abs()
        self.weight = flat.T @ torch.where(c.valid[..., None], c.hidden, 0).double().abs().flatten(0, 1)
        self.bias = flat.sum(0)

    def check(self, got: Tensor, truth: Tensor, name: str) -> None:
        bound = getattr(self, name) + 1e-6 * (self.eps > 1e-4) + 1e-30  # where float16 is subnormal
        worst = ((got.double() - truth).abs() / bound).max() if got.numel() else torch.zeros(())
        assert worst <= 1, f"{name}: {float(worst)} times what rounding explains"


@examples(60)
@given(cases())
def test_losses_from_logits(c: Case) -> None:
    bounds = Bounds(c, c.token_weights, from_hidden=False)
    _, (by_logits,) = differentiated(
        lambda x: (c.token_weights.double() * c.exact(x)).sum(), c.logits.double()
    )
    leaf = c.logits.detach().requires_grad_()
    nll = c.with_small_blocks(lambda: token_nll(leaf, c.labels, **c.engine))
    bounds.check(nll, c.exact(c.logits), "losses")
    (got,) = c.with_small_blocks(lambda: torch.autograd.grad((c.token_weights * nll).sum(), leaf))
    assert got.dtype == leaf.dtype
    assert got.shape == leaf.shape
    assert not got[~c.valid].any()
    bounds.check(got, by_logits, "logits")


@examples(60)
@given(cases(), st.sampled_from([None, "hidden", "weight"]))
def test_losses_from_hidden_states(c: Case, frozen: str | None) -> None:
    bounds = Bounds(c, c.token_weights, from_hidden=True)
    trained = [name for name in ("hidden", "weight", "bias")[: len(c.head)] if name != frozen]

    def weighed(*head: Tensor) -> Tensor:
        return (c.token_weights.double() * c.exact(linear(*head))).sum()

    _, truth = differentiated(weighed, *(x.double() for x in c.head))
    head = {
        n: x.detach().requires_grad_(n in trained)
        for n, x in zip(("hidden", "weight", "bias"), c.head, strict=False)
    }

    def ours() -> tuple[Tensor, tuple[Tensor, ...]]:
        nll = linear_token_nll(**head, labels=c.labels, **c.engine)
        return nll, torch.autograd.grad((c.token_weights * nll).sum(), [head[name] for name in trained])

    nll, grads = c.with_small_blocks(ours)
    bounds.check(nll, c.exact(linear(*(x.double() for x in c.head))), "losses")
    for name, got in zip(trained, grads, strict=True):
        assert got.dtype == c.hidden.dtype
        bounds.check(got, dict(zip(head, truth, strict=True))[name], name)


@examples(60)
@given(cases(backends=FUSED), st.sampled_from([0.0, 1.0, -0.3]), st.sampled_from([0, 1, 3, 100]))
def test_sum_and_a_few_more_in_one_pass(c: Case, of_sum: float, few: int) -> None:
    head = [x.detach().requires_grad_() for x in c.head]

    def ours() -> tuple[Tensor, ...]:
        total, nll = linear_nll_sum(*head[:2], c.labels, *head[2:], few=few, **c.engine)
        candidates = torch.where(c.valid, nll.detach(), -torch.inf).flatten()
        among = candidates.argsort(descending=True, stable=True)[:few]
        extra = torch.zeros_like(candidates).index_fill_(0, among, 1.7).view_as(nll) * c.valid
        value = of_sum * total + (extra * nll).sum()
        return total, nll, extra, *torch.autograd.grad(value, head)

    total, nll, extra, *grads = c.with_small_blocks(ours)
    weights = of_sum + extra.double()
    torch.testing.assert_close(total, nll.sum())
    bounds = Bounds(c, 1 + weights.abs(), from_hidden=True)  # it holds the gradient of the sum, rounded
    bounds.check(nll, c.exact(linear(*(x.double() for x in c.head))), "losses")
    _, truth = differentiated(
        lambda *head: (weights * c.exact(linear(*head))).sum(), *(x.double() for x in c.head)
    )
    for name, got, expected in zip(("hidden", "weight", "bias"), grads, truth, strict=False):
        bounds.check(got, expected, name)


def loss_of(path: str, c: Case, *head: Tensor, labels: Tensor | None = None, **options: Any) -> Tensor:
    """NVAMP of a head, with the engine's options of the case and these."""
    options = {**c.engine, **options}
    labels = c.labels if labels is None else labels
    if path == "logits":
        return nvamp_loss(linear(*head), labels, **options)
    return linear_nvamp_loss(*head[:2], labels, *head[2:], **options)


@examples(80)
@given(cases(DOUBLE), PATHS, MODES, LOSS, ITEMS, st.booleans())
def test_nvamp_is_the_definition(
    c: Case, path: str, gradient: Gradient, weights: dict[str, float], items: Any, shift: bool
) -> None:
    y = torch.full_like(c.labels, c.ignore_index)
    y[:, : y.shape[1] - 1] = c.labels[:, 1:]
    shifted = Case(**{**vars(c), "labels": y if shift else c.labels})
    full = {"alpha": 1.0, "beta": 0.02, "gamma": 0.001, **weights}
    number = None if items is None else float(items)

    def value(*head: Tensor, of: Any) -> Tensor:
        ell = shifted.exact(linear(*head))[shifted.valid]
        return of(ell) if len(ell) else 0 * sum(x.sum() for x in head)

    ell = shifted.exact(linear(*c.head))[shifted.valid]
    if gradient == "full" and len(ell) > 1:
        assume((ell - ell.mean()).abs().min() > 1e-6)  # |ℓ − μ| has a kink there
    expected, _ = differentiated(
        lambda *h: value(*h, of=lambda x: oracle.nvamp(x, **full, items=number)), *c.head
    )
    _, truth = differentiated(
        lambda *h: value(*h, of=lambda x: oracle.surrogate(x, gradient, **full, items=number)), *c.head
    )
    options = {"num_items_in_batch": items, "shift": shift, "gradient": gradient, **weights}
    got, grads = c.with_small_blocks(
        lambda: differentiated(lambda *h: loss_of(path, c, *h, **options), *c.head)
    )
    torch.testing.assert_close(got, expected, **TIGHT)
    torch.testing.assert_close(grads, truth, **TIGHT)


# What must make no difference ---------------------------------------------------------------------------


@examples(40)
@given(cases(DOUBLE), PATHS, MODES, st.randoms(use_true_random=False))
def test_the_order_of_tokens_does_not_matter(c: Case, path: str, gradient: Gradient, random: Any) -> None:
    order = list(range(c.labels.numel()))
    random.shuffle(order)
    hidden, labels = c.hidden.flatten(0, 1), c.labels.flatten()

    def result(hidden: Tensor, labels: Tensor) -> tuple[Tensor, list[Tensor]]:
        options = {"labels": labels, "gradient": gradient, "shift": False}
        return differentiated(lambda *h: loss_of(path, c, *h, **options), hidden, *c.head[1:])

    value, (by_hidden, *others) = result(hidden, labels)
    assume(gradient != "full" or no_kink(c))
    got, (by_permuted, *same) = result(hidden[order], labels[order])
    torch.testing.assert_close(got, value, **TIGHT)
    torch.testing.assert_close(by_permuted, by_hidden[order], **TIGHT)
    torch.testing.assert_close(same, others, **TIGHT)


def no_kink(c: Case) -> bool:
    """Whether rounding cannot decide on which side of their mean losses are."""
    ell = c.exact(linear(*c.head))[c.valid]
    return len(ell) < 2 or bool((ell - ell.mean()).abs().min() > 1e-6)


@examples(20)
@given(cases(DOUBLE), PATHS, MODES, LOSS, st.data())
def test_micro_batches_add_up(
    c: Case, path: str, gradient: Gradient, weights: dict[str, float], data: st.DataObject
) -> None:
    """Cross-entropy by num_items_in_batch; all of NVAMP by the weights of a first pass."""
    hidden, labels = c.hidden.flatten(0, 1), c.labels.flatten()
    cut = data.draw(st.integers(0, len(labels)))
    parts = [slice(0, cut), slice(cut, len(labels))]
    assume(gradient != "full" or no_kink(c))

    def cross_entropy(*head: Tensor) -> Tensor:
        options = {"alpha": 0, "gamma": 0, "shift": False, "num_items_in_batch": max(int(c.valid.sum()), 1)}
        return sum(
            loss_of(path, c, head[0][at], *head[1:], labels=labels[at], gradient="scalar", **options)
            for at in parts
        )

    def whole(*head: Tensor, **weights: float) -> Tensor:
        return loss_of(path, c, *head, labels=labels, shift=False, gradient=gradient, **weights)

    head = [hidden, *c.head[1:]]
    expected = differentiated(
        lambda *h: loss_of(path, c, *h, labels=labels, shift=False, alpha=0, gamma=0), *head
    )
    torch.testing.assert_close(differentiated(cross_entropy, *head), expected, **TIGHT)

    valid = c.valid.flatten()
    ell = torch.cat(
        [linear_token_nll(hidden[at], *c.head[1:2], labels[at], *c.head[2:], **c.engine) for at in parts]
    )
    w = token_weights(NVAMP(gradient=gradient, **weights), ell, valid)

    def weighed(*head: Tensor) -> Tensor:
        return sum(
            (w[at] * linear_token_nll(head[0][at], head[1], labels[at], *head[2:], **c.engine)).sum()
            for at in parts
        )

    got = differentiated(weighed, *head)[1]
    torch.testing.assert_close(got, differentiated(lambda *h: whole(*h, **weights), *head)[1], **TIGHT)


@examples(40)
@given(
    cases(DOUBLE), PATHS, MODES, st.integers(1, 5), st.sampled_from([0.0, torch.nan, torch.inf]), st.data()
)
def test_ignored_rows_change_nothing(
    c: Case, path: str, gradient: Gradient, more: int, junk: float, data: st.DataObject
) -> None:
    hidden, labels = c.hidden.flatten(0, 1), c.labels.flatten()
    at = data.draw(st.integers(0, len(labels)))
    padded = torch.cat([hidden[:at], hidden.new_full((more, hidden.shape[1]), junk), hidden[at:]])
    padded_labels = torch.cat([labels[:at], labels.new_full((more,), c.ignore_index), labels[at:]])

    def result(hidden: Tensor, labels: Tensor) -> tuple[Tensor, list[Tensor]]:
        if path == "linear":
            options = {"labels": labels, "gradient": gradient, "shift": False}
            return differentiated(lambda *h: loss_of(path, c, *h, **options), hidden, *c.head[1:])
        options = {"gradient": gradient, "shift": False, **c.engine}
        return differentiated(lambda x: nvamp_loss(x, labels, **options), linear(hidden, *c.head[1:]))

    value, (by_rows, *others) = result(hidden, labels)
    assume(gradient != "full" or no_kink(c))
    got, (by_padded, *same) = result(padded, padded_labels)
    torch.testing.assert_close(got, value, **TIGHT)
    assert not by_padded[at : at + more].any()
    torch.testing.assert_close(torch.cat([by_padded[:at], by_padded[at + more :]]), by_rows, **TIGHT)
    torch.testing.assert_close(same, others, **TIGHT)


@examples(40)
@given(
    cases(DOUBLE, engine=st.sampled_from([{}, {"label_smoothing": 0.1}, {"logit_scale": -0.5}])),
    PATHS,
    MODES,
    st.sampled_from([1.0, -30.0, 1e4]),
)
def test_a_constant_on_all_logits_changes_nothing(
    c: Case, path: str, gradient: Gradient, constant: float
) -> None:
    """As a bias; without z-loss and soft-cap, which mean to see it."""
    assume(gradient != "full" or no_kink(c))
    bias = c.hidden.new_zeros(len(c.weight)) if c.bias is None else c.bias
    head = c.hidden, c.weight, bias
    value, grads = differentiated(lambda *h: loss_of(path, c, *h, gradient=gradient, shift=False), *head)
    got, same = differentiated(
        lambda *h: loss_of(path, c, *h, gradient=gradient, shift=False), *head[:2], bias + constant
    )
    torch.testing.assert_close(got, value, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(same, grads, rtol=1e-6, atol=1e-6)


@examples(40)
@given(cases(DOUBLE), PATHS, MODES, st.sampled_from([0.1, 3.0, -2.0]))
def test_logit_scale_is_a_scale_of_the_logits(c: Case, path: str, gradient: Gradient, scale: float) -> None:
    assume(gradient != "full" or no_kink(Case(**{**vars(c), "options": {**c.options, "logit_scale": scale}})))

    def scaled(*head: Tensor) -> Tensor:
        return loss_of(path, c, *head, gradient=gradient, logit_scale=scale, shift=False)

    def of_scaled(hidden: Tensor, weight: Tensor, *bias: Tensor) -> Tensor:
        head = hidden, scale * weight, *(scale * b for b in bias)
        return loss_of(path, c, *head, gradient=gradient, logit_scale=1.0, shift=False)

    torch.testing.assert_close(differentiated(scaled, *c.head), differentiated(of_scaled, *c.head), **TIGHT)
