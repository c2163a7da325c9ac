"""Value and weights of every objective against float64 autograd of its definition."""

import math
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from nvamp import TokenLoss
from nvamp.functional import token_weights
from nvamp.objectives import (
    DFT,
    GCE,
    NVAMP,
    Batch,
    ClippedPolicy,
    CrossEntropy,
    EntropyWeighted,
    Focal,
    Objective,
    Tail,
    Tilted,
    TokenWeighted,
    Truncated,
)
from tests.objectives.definitions import definition
from tests.objectives.problems import KINDS, Tokens, fixed, is_exact, objectives, tokens
from tests.strategies import examples


def exact(o: Objective, t: Tokens, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """L, ∂L/∂ℓ and ∂L/∂H by the definition, the last two [N]."""
    ell, entropy = (x[t.valid].clone().requires_grad_() for x in (t.nll, t.entropy))
    loss = definition(o, ell, t.items, entropy, **{name: x[t.valid] for name, x in inputs.items()})
    grads = torch.autograd.grad(loss, (ell, entropy), allow_unused=True, materialize_grads=True)
    weights = [torch.zeros_like(t.nll).masked_scatter(t.valid, grad) for grad in grads]
    return loss.detach(), *weights


def same(ours: Tensor, exact: Tensor) -> None:
    torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("name", KINDS)
@examples(60)
@given(data=st.data())
def test_definition(name: str, data: st.DataObject) -> None:
    o, t = data.draw(objectives(KINDS[name])), data.draw(tokens())
    assume(is_exact(o, t.nll[t.valid]))
    inputs = t.given(o, data.draw(st.booleans()))
    ell, entropy = t.nll.clone().requires_grad_(), t.entropy.clone().requires_grad_()
    call: Any = {"num_items_in_batch": t.items, **inputs}
    if o.needs_entropy:
        call["entropy"] = entropy
    loss = TokenLoss(o)(ell, t.valid, **call)
    ours = torch.autograd.grad(loss, (ell, entropy), allow_unused=True, materialize_grads=True)
    value, by_nll, by_entropy = exact(o, t, inputs)
    same(loss.detach(), value)
    same(ours[0], by_nll)
    same(ours[1], by_entropy)
    same(token_weights(o, t.nll, t.valid, **call), by_nll)


@pytest.mark.parametrize("name", KINDS)
@examples(30)
@given(data=st.data())
def test_results(name: str, data: st.DataObject) -> None:
    """Weights are finite, as 0·∞ would be NaN, and only the hardest few have one beside `shared`."""
    o, t = data.draw(objectives(KINDS[name])), data.draw(tokens(junk=False))
    few = o.few_weights(len(t.nll))
    ell = t.nll.masked_fill(~t.valid, 0)
    result = o.evaluate(Batch(ell, t.valid, None, inputs=t.given(o), entropy=t.entropy))
    assert result.loss.isfinite()
    assert result.weights().isfinite().all()
    if few is None:
        assert result.per_token is not None
        return
    assert result.shared is not None
    assert result.shared.dim() == 0
    if few == 0:
        assert result.per_token is None
        return
    own = torch.zeros_like(ell) if result.per_token is None else result.per_token
    assert (own != 0).sum() <= few
    assert not own[~t.valid].any()
    if own.any():
        assert own[t.valid & (ell > ell[own != 0].min())].all()


# Edges -------------------------------------------------------------------------------------------------

EVERY = [pytest.param(kind(), id=name) for name, kind in KINDS.items()]


def judged(o: Objective, nll: list[float], **options: Any) -> tuple[float, list[float]]:
    """L and weights of these losses, with inputs that do not stand out."""
    ell = torch.tensor(nll, dtype=torch.float64, requires_grad=True)
    t = fixed(torch.zeros(len(nll), dtype=torch.int64))
    if o.needs_entropy:
        options = {"entropy": torch.ones_like(ell), **options}
    loss = TokenLoss(o)(ell, **(t.given(o, optional=False) | options))
    loss.backward()
    assert ell.grad is not None
    return loss.item(), ell.grad.tolist()


@pytest.mark.parametrize("o", EVERY)
def test_nan_comes_through(o: Objective) -> None:
    loss, _ = judged(o, [1.0, math.nan, 2.0, 0.5])
    assert math.isnan(loss)


@pytest.mark.parametrize("o", EVERY)
def test_equal_losses(o: Objective) -> None:
    for n in (1, 4):
        loss, weights = judged(o, n * [0.0])
        assert math.isfinite(loss)
        assert all(map(math.isfinite, weights))


@pytest.mark.parametrize(
    "o",
    [
        CrossEntropy(),
        NVAMP(),
        NVAMP(tail=0.5),
        Tail(),
        Tilted(),
        Focal(),
        DFT(),
        EntropyWeighted(),
        TokenWeighted(),
    ],
    ids=str,
)
def test_infinite_losses_come_through(o: Objective) -> None:
    assert not math.isfinite(judged(o, [1.0, math.inf, 2.0])[0])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_truncated_may_be_anything(bad: float) -> None:
    loss, weights = judged(Truncated(share=0.5), [1.0, bad, 2.0, bad])
    assert loss == 3.0 / 4
    assert weights == [0.25, 0.0, 0.25, 0.0]
    assert math.isnan(judged(Truncated(share=0.25), [1.0, math.nan, 2.0, math.nan])[0])
    assert judged(Truncated(share=1.0), [3.0, bad, 2.0])[1] == [0, 0, 1 / 3]  # never all of them


def test_some_formulas_have_a_limit_at_infinity() -> None:
    assert judged(GCE(q=0), [1.0, 2.0]) == judged(CrossEntropy(), [1.0, 2.0])
    assert judged(GCE(q=0.5), [math.inf, math.inf]) == (2.0, [0.0, 0.0])
    loss, weights = judged(Tilted(t=-1.0), [math.inf, 0.0])
    assert loss == pytest.approx(math.log(2))
    assert weights == [0.0, 1.0]


@pytest.mark.parametrize("gamma", [0.1, 0.5, 1.0, 2.0])
def test_focal_of_a_sure_prediction(gamma: float) -> None:
    for ell in (0.0, -1e-9):  # rounded
        assert judged(Focal(gamma), [ell, ell]) == (0.0, [0.0, 0.0])


@pytest.mark.parametrize("t", [1e-30, -1e-30, 1e-6, 1e-3, 1.0, -3.0, 40.0])
def test_tilted_in_float32(t: float) -> None:
    """As exact as float32 is, for any tilt, any size of the losses and any number of tokens."""
    g = torch.Generator().manual_seed(0)
    for ell in (
        torch.rand(5, generator=g),
        100 + torch.rand(5000, generator=g),
        80 * torch.rand(5000, generator=g),
    ):
        exact = (t * (ell.double() - 90)).logsumexp(0) - math.log(len(ell))
        mean = (
            90 + exact / t if abs(t) > 1e-5 else ell.double().mean() + t / 2 * ell.double().var(correction=0)
        )
        torch.testing.assert_close(TokenLoss(Tilted(t))(ell).double(), mean, rtol=3e-7, atol=0)
        weights = token_weights(Tilted(t), ell)
        torch.testing.assert_close(weights.sum(), torch.tensor(1.0), rtol=1e-5, atol=0)


@pytest.mark.parametrize("t", [-10.0, 10.0])
def test_tilted_knows_nothing_of_what_does_not_count(t: float) -> None:
    """Not even if the loss of 0 that it has is far from those that count."""
    for valid in ([True, True, True, False], [False] * 4):
        counts = torch.tensor(valid)
        result = Tilted(t).evaluate(Batch(20.0 * counts, counts))
        torch.testing.assert_close(result.weights(), counts / 3)
        assert result.loss == 20 * valid[0]


def test_tokens_without_weight() -> None:
    o, zero = TokenWeighted(normalize=True), torch.zeros(2, dtype=torch.float64)
    assert judged(o, [1.0, 2.0], token_weight=zero) == (0.0, [0.0, 0.0])


@pytest.mark.parametrize("kind", ["eaft", "mile"])
def test_an_entropy_that_is_rounded_below_zero(kind: Any) -> None:
    below = torch.full((2,), -1e-9, dtype=torch.float64)
    loss, _ = judged(EntropyWeighted(kind, 0.5), [1.0, 2.0], entropy=below)
    assert loss == (0.0 if kind == "eaft" else 1.5)


def test_how_far_the_entropy_of_20_classes_is_from_that_of_all() -> None:
    """The bound that `EntropyWeighted` documents."""
    for scale in (0.1, 1.0, 3.0, 10.0):
        logits = scale * torch.randn(
            50, 1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64
        )
        p, entropy = logits.softmax(-1), torch.special.entr
        top = p.topk(20).values
        m = 1 - top.sum(-1)
        of_top = entropy(top / top.sum(-1, keepdim=True)).sum(-1)
        bound = entropy(m) + entropy(1 - m) + m * math.log(1000)
        assert ((entropy(p).sum(-1) - of_top).abs() <= bound + 1e-12).all()


@pytest.mark.parametrize(
    ("ratio", "advantage", "value", "weight"),
    [
        (1.25, 1.0, -1.25, 1.25),
        (1.5, 1.0, -1.28, 0.0),
        (0.1, 1.0, -0.1, 0.1),
        (0.9, -2.0, 1.8, -1.8),
        (0.5, -2.0, 1.6, 0.0),
        (1.5, -2.0, 3.0, -3.0),
    ],
)
def test_a_ratio_is_clipped_on_both_sides(
    ratio: float, advantage: float, value: float, weight: float
) -> None:
    old = torch.tensor([-1.0 - math.log(ratio)], dtype=torch.float64)
    o, a = ClippedPolicy(clip=0.2, clip_high=0.28), torch.tensor([advantage])
    loss, weights = judged(o, [1.0], advantage=a, old_logprob=old)
    assert (loss, *weights) == pytest.approx((value, weight))


@pytest.mark.parametrize(("advantage", "moved"), [(1.0, 0.0), (-1.0, 1.0)])
def test_a_ratio_that_overflows_is_clipped(advantage: float, moved: float) -> None:
    old, a = torch.tensor([-1000.0]), torch.tensor([advantage])
    loss, weights = judged(ClippedPolicy(), [1.0], advantage=a, old_logprob=old)
    assert (loss, weights) == ((-1.2, [0.0]) if not moved else (math.inf, [-math.inf]))


def test_the_default_dtype_does_not_matter() -> None:
    nll = torch.rand(50, dtype=torch.float64)
    for o in (NVAMP(tail=0.1), Tail(0.1, 0.3), Truncated(), Tilted(), GCE(), TokenWeighted(normalize=True)):
        inputs = {"token_weight": nll} if o.inputs else {}
        exact = TokenLoss(o)(nll, **inputs), token_weights(o, nll, **inputs)
        torch.set_default_dtype(torch.bfloat16)
        try:
            found = TokenLoss(o)(nll, **inputs), token_weights(o, nll, **inputs)
        finally:
            torch.set_default_dtype(torch.float32)
        torch.testing.assert_close(found, exact, rtol=0, atol=0)


# Micro-batches -----------------------------------------------------------------------------------------

# A token's weight depends on the other tokens of its batch.
OF_A_WHOLE_BATCH: list[Objective] = [NVAMP(), Tail(), Tilted(), Truncated(), TokenWeighted(normalize=True)]
OF_ONE_TOKEN = [name for name, kind in KINDS.items() if kind not in {NVAMP, Tail, Tilted, Truncated}]


@pytest.mark.parametrize("name", OF_ONE_TOKEN)
@examples(20)
@given(data=st.data())
def test_micro_batches_add_up(name: str, data: st.DataObject) -> None:
    o, t = data.draw(objectives(KINDS[name])), data.draw(tokens(junk=False))
    assume(o not in OF_A_WHOLE_BATCH)
    cut = data.draw(st.integers(0, len(t.nll)))
    whole = int(t.valid.sum())

    def parts(x: Tensor) -> list[Tensor]:
        return [x[:cut], x[cut:]]

    def judge(part: Any) -> tuple[Tensor, Tensor]:
        nll, valid, entropy = (part(x) for x in (t.nll, t.valid, t.entropy))
        call: Any = {name: part(x) for name, x in t.given(o).items()}
        if o.needs_entropy:
            call["entropy"] = entropy
        loss = TokenLoss(o)(nll, valid, max(whole, 1), **call)
        return loss, token_weights(o, nll, valid, num_items_in_batch=max(whole, 1), **call)

    losses, weights = zip(*(judge(lambda x, i=i: parts(x)[i]) for i in (0, 1)), strict=True)
    same(sum(losses), judge(lambda x: x)[0])
    same(torch.cat(weights), judge(lambda x: x)[1])


@pytest.mark.parametrize("o", OF_A_WHOLE_BATCH, ids=str)
def test_micro_batches_alike_add_up(o: Objective) -> None:
    """What depends on the whole batch is scaled by N/M: copies of a batch add up to the loss of one of them."""
    nll, weight = torch.rand(2, 20, dtype=torch.float64)
    inputs = {"token_weight": weight} if o.inputs else {}
    alone = TokenLoss(o)(nll, **inputs)
    for m in (60, torch.tensor(60)):
        same(3 * TokenLoss(o)(nll, None, m, **inputs), alone)
        same(3 * token_weights(o, nll, num_items_in_batch=m, **inputs), token_weights(o, nll, **inputs))
