"""Every objective on every path: logits and hidden states, each backend, each dtype, compiled."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy

from nvamp import LinearLoss, Loss, TokenLoss
from nvamp.objectives import (
    NVAMP,
    Batch,
    ClippedPolicy,
    CrossEntropy,
    EntropyWeighted,
    Objective,
    Result,
    Tail,
    Tilted,
    TokenWeighted,
    Truncated,
)
from tests.engine.problems import HALF, gradients
from tests.objectives.definitions import definition
from tests.objectives.problems import KINDS, fixed, is_exact, objectives
from tests.oracle import relative_error
from tests.strategies import Case, cases, examples

# The default of each, so that a new one is here at once, and what takes another way.
OBJECTIVES: list[Objective] = [
    *(kind() for kind in KINDS.values()),
    NVAMP(gamma=0.5, tail=0.2),
    Tail(share=0.3),
    Tilted(t=-0.7),
    EntropyWeighted("mile"),
    TokenWeighted(normalize=True),
    ClippedPolicy(clip_high=0.28, kl=0.1, entropy=0.1),
]
ids: Any = {"ids": str}


def entropy_of(logits: Tensor) -> Tensor:
    """[...] of the predictions that logits [..., V] are, in nats."""
    return torch.special.entr(logits.softmax(-1)).sum(-1)


# Values ------------------------------------------------------------------------------------------------


def exact(o: Objective, case: Case, logits: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    z = case.options.get("logit_scale", 1.0) * logits[case.valid]
    if cap := case.options.get("softcap"):
        z = cap * (z / cap).tanh()
    chosen = {name: x[case.valid] for name, x in inputs.items()}
    return definition(o, case.exact(logits)[case.valid], None, entropy_of(z), **chosen)


@pytest.mark.parametrize("name", KINDS)
@examples(6)
@given(data=st.data())
def test_paths(name: str, data: st.DataObject) -> None:
    o, case = data.draw(objectives(KINDS[name])), data.draw(cases(dtypes=[torch.float64]))
    assume(is_exact(o, case.exact(case.logits)[case.valid]))
    inputs = fixed(case.labels).given(o)
    of_logits = Loss(o, shift=False, **case.engine)
    of_hidden = LinearLoss(o, shift=False, **case.engine)
    ours = case.with_small_blocks(
        lambda: gradients(lambda x: of_logits(x, case.labels, **inputs), case.logits)
    )
    same(ours, gradients(lambda x: exact(o, case, x, inputs), case.logits))

    def ours_of(h: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        return of_hidden(h, w, case.labels, b, **inputs)

    def exact_of(h: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        return exact(o, case, torch.nn.functional.linear(h, w, b), inputs)

    same(case.with_small_blocks(lambda: gradients(ours_of, *case.head)), gradients(exact_of, *case.head))


def same(ours: tuple[Tensor, list[Tensor]], exact: tuple[Tensor, list[Tensor]]) -> None:
    torch.testing.assert_close(ours, exact, rtol=1e-8, atol=1e-9)


# Dtypes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*HALF, torch.float32], ids=str)
@pytest.mark.parametrize("o", OBJECTIVES, **ids)
def test_errors_are_no_larger_than_eagers(o: Objective, dtype: torch.dtype) -> None:
    """Eager computes the same formula in the dtype of the logits, as a loop of one's own would."""
    ours, eager = torch.zeros(2), torch.zeros(2)
    batches = 60 if dtype == torch.float32 else 5  # a factor that all weights have may be right by chance
    for seed in range(batches):
        g = torch.Generator().manual_seed(seed)
        logits = (2 * torch.randn(400, 50, generator=g, dtype=torch.float64)).to(dtype)
        labels = torch.randint(50, (400,), generator=g)
        labels[torch.rand(400, generator=g) < 0.2] = -100
        mine, eagers = errors(o, logits, labels)
        ours, eager = ours + mine, eager + eagers
    assert ours[0] <= 1.1 * eager[0] + batches * torch.finfo(torch.float32).eps / 4  # and so may a value
    assert ours[1] <= 1.1 * eager[1]


def errors(o: Objective, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Relative errors of value and gradient [2], ours and eager's."""
    inputs = {name: x.to(logits.dtype) for name, x in fixed(labels).given(o).items()}
    valid = labels != -100
    scale = 1000 if logits.dtype == torch.float16 else 1  # as a loss scaler does, so that none is lost

    def ours(x: Tensor) -> Tensor:
        return scale * Loss(o, shift=False)(x, labels, **inputs)

    def eager(x: Tensor) -> Tensor:
        ell = cross_entropy(x[valid], labels[valid], reduction="none")
        chosen = {name: i[valid].to(x.dtype) for name, i in inputs.items()}
        return scale * definition(o, ell, None, entropy_of(x[valid]), **chosen)

    value, (grad,) = gradients(eager, logits.double())

    def off(loss: Any) -> Tensor:
        found, (of_logits,) = gradients(loss, logits)
        return torch.tensor([relative_error(found, value), relative_error(of_logits, grad)])

    return off(ours), off(eager)


# Compiled ----------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated")
@pytest.mark.parametrize("o", OBJECTIVES, **ids)
def test_compiled(o: Objective) -> None:
    torch._dynamo.reset()
    labels = torch.arange(24).view(2, 12) % 7
    labels[0, :5] = -100
    logits = torch.randn(2, 12, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    inputs, items = fixed(labels).given(o), torch.tensor(31)
    criterion = Loss(o)
    compiled: Any = torch.compile(criterion, fullgraph=True, backend="aot_eager")
    found = gradients(lambda x: compiled(x, labels, items, **inputs), logits)
    same(found, gradients(lambda x: criterion(x, labels, items, **inputs), logits))


@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated")
def test_what_is_truncated_may_be_anything_in_a_graph() -> None:
    nll = torch.tensor([1.0, torch.inf, 2.0, torch.nan])
    compiled: Any = torch.compile(TokenLoss(Truncated(0.5)), fullgraph=True, backend="aot_eager")
    loss, (grad,) = gradients(compiled, nll)
    assert loss == 0.75
    assert grad.tolist() == [0.25, 0, 0.25, 0]


# Inputs ------------------------------------------------------------------------------------------------

LOGITS, LABELS = torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.int64)
COLUMN = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("o", "inputs", "error", "message"),
    [
        (TokenWeighted(), {}, TypeError, "token_weight is missing: TokenWeighted needs it, shaped like the labels [2, 3]"),
        (TokenWeighted(), {"token_weight": None}, TypeError, "token_weight is missing"),
        (TokenWeighted(), {"token_weight": COLUMN[:, :2]}, ValueError, "token_weight must have the shape of the labels, [2, 3]"),
        (TokenWeighted(), {"token_weight": 2.0}, TypeError, "token_weight must be a tensor, got float"),
        (TokenWeighted(), {"token_weight": 1j * COLUMN}, TypeError, "token_weight must be real, got torch.complex64"),
        (TokenWeighted(), {"token_weight": COLUMN, "advantage": COLUMN}, TypeError, "advantage is not an input of TokenWeighted, which takes token_weight"),
        (Tail(), {"token_weight": COLUMN}, TypeError, "token_weight is not an input of Tail, which takes no per-token inputs"),
        (ClippedPolicy(), {"old_logprob": COLUMN}, TypeError, "advantage is missing: ClippedPolicy needs it"),
        (ClippedPolicy(kl=0.1), {"advantage": COLUMN}, TypeError, "ref_logprob is missing: ClippedPolicy needs it"),
        (ClippedPolicy(), {"advantage": COLUMN, "old_logprobs": COLUMN}, TypeError, "old_logprobs"),
    ],
    ids=lambda x: str(x)[:30],
)  # fmt: skip
def test_inputs_that_do_not_fit(o: Objective, inputs: Any, error: type[Exception], message: str) -> None:
    calls: list[Any] = [
        partial(Loss(o), LOGITS, LABELS),
        partial(LinearLoss(o), LOGITS, torch.zeros(7, 5), LABELS),
        partial(TokenLoss(o), COLUMN),
    ]
    for call in calls:
        with pytest.raises(error) as raised:
            call(**inputs)
        assert message in str(raised.value)


def test_inputs_are_shifted_with_the_labels() -> None:
    weight = torch.tensor([[9.0, 0.0, 1.0, 0.0]])  # the first label is no target
    logits, labels = torch.randn(1, 4, 5), torch.tensor([[0, 1, 2, 3]])
    loss = Loss(TokenWeighted())(logits, labels, 1, token_weight=weight)
    torch.testing.assert_close(loss, cross_entropy(logits[0, 1], labels[0, 2]))


def test_entropy_that_is_missing() -> None:
    with pytest.raises(TypeError, match="entropy is missing: entropy needs it"):
        TokenLoss(EntropyWeighted())(COLUMN)
    TokenLoss(ClippedPolicy())(COLUMN, advantage=COLUMN)
    with pytest.raises(TypeError, match=r"entropy is missing: clipped_policy:entropy=0.1 needs it"):
        TokenLoss(ClippedPolicy(entropy=0.1))(COLUMN, advantage=COLUMN)


@dataclass(frozen=True)
class Careless(Objective):
    """An objective whose weights are NaN where the loss is 0, as it is for tokens that do not count."""

    def evaluate(self, batch: Batch) -> Result:
        return batch.mean(batch.nll, batch.nll / batch.nll)


def test_weights_of_ignored_tokens_do_not_matter() -> None:
    logits, labels = torch.randn(2, 5, 7, requires_grad=True), torch.randint(7, (2, 5))
    labels[0, 2] = -100
    expected = torch.autograd.grad(Loss(CrossEntropy())(logits, labels), logits)
    criterion = Loss(Careless())
    for each in (criterion, torch.compile(criterion, fullgraph=True, backend="aot_eager")):
        loss = each(logits, labels)
        assert loss.isfinite()
        torch.testing.assert_close(torch.autograd.grad(loss, logits), expected)
