"""The losses: value and gradient by the definition, and what a user does with a module."""

import copy
import math
import pickle
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from benchmarks.original import original_nvamp
from nvamp import LinearLoss, LinearNVAMPLoss, Loss, NVAMPLoss, NVAMPStats, TokenLoss, TokenNVAMPLoss
from nvamp.functional import linear_nvamp_loss, nvamp_loss, token_nll, token_weights
from nvamp.objectives import GRADIENTS, NVAMP, Batch, Focal, Gradient, Objective, Result, TokenWeighted
from nvamp.options import HUGE, TINY
from tests import oracle
from tests.engine.problems import IGNORED
from tests.models import CRITERIA, HeadAndLoss
from tests.parameters import with_fused, with_gradient, with_path
from tests.processes import python
from tests.strategies import examples

B, S, D, V = 3, 7, 5, 11


@pytest.fixture
def hidden() -> Tensor:
    return torch.randn(B, S, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def weight() -> Tensor:
    return torch.randn(V, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def labels() -> Tensor:
    labels = torch.randint(V, (B, S), generator=torch.Generator().manual_seed(2))
    labels[0, 2] = labels[1, :3] = labels[2, -1] = IGNORED
    return labels


def loss_of(path: str, hidden: Tensor, weight: Tensor, labels: Tensor, **options: Any) -> Any:
    if path == "logits":
        return nvamp_loss(hidden @ weight.T, labels, **options)
    return linear_nvamp_loss(hidden, weight, labels, **options)


def shifted_losses(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Losses of the valid tokens by the definition: position t against label t + 1."""
    logits, y = (hidden @ weight.T)[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return oracle.token_losses(logits[y != IGNORED], y[y != IGNORED])


@with_path
@with_gradient
@with_fused
@pytest.mark.parametrize("items", [None, 40])
@pytest.mark.parametrize("coefficients", [(1.0, 0.02, 0.001), (0.5, 1.0, 0.3), (0.0, 1.0, 0.0)])
def test_value_and_gradient(
    path: str,
    gradient: Gradient,
    backend: str,
    items: int | None,
    coefficients: tuple[float, float, float],
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
) -> None:
    h, w = hidden.requires_grad_(), weight.requires_grad_()
    alpha, beta, gamma = coefficients
    weights: Any = {"alpha": alpha, "beta": beta, "gamma": gamma}
    options: Any = {"num_items_in_batch": items, "gradient": gradient, "backend": backend}
    loss = loss_of(path, h, w, labels, **options, **weights)
    got = torch.autograd.grad(loss, (h, w))
    ell = shifted_losses(h, w, labels)
    torch.testing.assert_close(loss, oracle.nvamp(ell, **weights, items=items))
    expected = torch.autograd.grad(oracle.surrogate(ell, gradient, **weights, items=items), (h, w))
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


@examples(60)
@given(
    st.integers(1, 3), st.integers(2, 9), st.integers(2, 30), st.sampled_from([0.0, 0.02, 1.0]),
    st.sampled_from([0.0, 0.001, 0.5]), st.sampled_from([1e-6, 1e-2]), st.integers(0, 99),
)  # fmt: skip
def test_the_published_loss(
    batch: int, seq: int, vocab: int, beta: float, gamma: float, eps: float, seed: int
) -> None:
    """Its value in every mode, and its gradient in mode "detached"."""
    g = torch.Generator().manual_seed(seed)
    logits = (2 * torch.randn(batch, seq, vocab, dtype=torch.float64, generator=g)).requires_grad_()
    labels = torch.randint(vocab, (batch, seq), generator=g)
    published = original_nvamp(logits, labels, beta=beta, gamma=gamma, eps=eps)
    (expected,) = torch.autograd.grad(published, logits)
    for gradient in GRADIENTS:
        options: Any = {"beta": beta, "gamma": gamma, "eps": eps, "gradient": gradient}
        loss = nvamp_loss(logits, labels, **options)
        torch.testing.assert_close(loss, published, rtol=1e-10, atol=1e-10)
        single = nvamp_loss(logits.detach().bfloat16(), labels, **options)
        coarse = original_nvamp(logits.detach().bfloat16(), labels, beta=beta, gamma=gamma, eps=eps)
        torch.testing.assert_close(single, coarse, rtol=1e-4, atol=1e-3)  # 1e-7 / sqrt(eps), in float32
        if gradient == "detached":
            (got,) = torch.autograd.grad(loss, logits)
            torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@with_path
@with_fused
def test_every_mode_has_the_same_value_to_the_bit(
    path: str, backend: str, hidden: Tensor, weight: Tensor, labels: Tensor
) -> None:
    h, w = hidden.float().requires_grad_(), weight.float()
    for coefficients in ({}, {"gamma": 0.3, "tail": 0.2}):
        options: Any = {"backend": backend, **coefficients}
        assert (
            len({float(loss_of(path, h, w, labels, gradient=g, **options).detach()) for g in GRADIENTS}) == 1
        )


@with_path
def test_gradcheck_of_the_exact_mode(path: str, hidden: Tensor, weight: Tensor, labels: Tensor) -> None:
    torch.autograd.gradcheck(
        lambda h, w: loss_of(path, h, w, labels, gradient="full", gamma=0.5),
        (hidden.requires_grad_(), weight.requires_grad_()),
    )


@with_path
@pytest.mark.parametrize("gradient", ["scalar", "token", "detached"])
def test_gradcheck_tells_the_other_modes_from_the_exact_one(
    path: str, gradient: Gradient, hidden: Tensor, weight: Tensor, labels: Tensor
) -> None:
    assert not torch.autograd.gradcheck(
        lambda h: loss_of(path, h, weight, labels, gradient=gradient),
        hidden.requires_grad_(),
        raise_exception=False,
    )


@with_path
@with_gradient
def test_shift_is_a_matter_of_labels(
    path: str, gradient: Gradient, hidden: Tensor, weight: Tensor, labels: Tensor
) -> None:
    inside = loss_of(path, hidden, weight, labels, gradient=gradient)
    outside = loss_of(path, hidden[:, :-1], weight, labels[:, 1:], gradient=gradient, shift=False)
    torch.testing.assert_close(inside, outside)


@with_path
def test_stats(path: str, hidden: Tensor, weight: Tensor, labels: Tensor) -> None:
    h = hidden.requires_grad_()
    loss, stats = loss_of(path, h, weight, labels, return_stats=True, num_items_in_batch=40, gradient="token")
    ell = shifted_losses(hidden, weight, labels).detach()
    mean, std, z = oracle.statistics(ell)
    w = (z.abs() + 0.02) / 40
    w[ell.argmax()] += 0.001 * len(ell) / 40
    expected = {
        "cross_entropy": ell.sum() / 40,
        "mean": mean,
        "std": std,
        "dispersion": z.abs().mean(),
        "max": ell.max(),
        "num_tokens": torch.tensor(len(ell)),
        "min_weight": w.min(),
        "max_weight": w.max(),
    }
    for name, value in expected.items():
        torch.testing.assert_close(getattr(stats, name), value, msg=lambda m, n=name: f"{n}: {m}")
    assert not any(t.requires_grad for t in stats if t is not None)
    rows = token_nll((hidden @ weight.T), torch.cat([labels[:, 1:], labels.new_full((B, 1), IGNORED)], 1))
    assert stats.max_index == rows.argmax()
    assert loss.requires_grad


@with_path
def test_uint8_labels_are_indices(path: str, hidden: Tensor, weight: Tensor, labels: Tensor) -> None:
    """In uint8 an ignore_index of -100 would be the class 156."""
    wide = torch.randn(200, D, dtype=torch.float64)
    y = labels.clamp(min=0)
    y[0, 3] = 156
    torch.testing.assert_close(*(loss_of(path, hidden, wide, kind) for kind in (y.to(torch.uint8), y)))


@with_path
def test_flattened_labels_are_not_shifted_across_rows(
    path: str, hidden: Tensor, weight: Tensor, labels: Tensor
) -> None:
    flat = hidden.flatten(0, 1), weight, labels.flatten()
    with pytest.raises(ValueError, match=r"labels must have shape \[batch, seq\] to be shifted, got \[21\]"):
        loss_of(path, *flat)
    assert loss_of(path, *flat, shift=False).isfinite()


@with_path
def test_stats_describe_the_losses_whatever_the_loss_needs(
    path: str, hidden: Tensor, weight: Tensor, labels: Tensor
) -> None:
    """Without alpha, mean, deviation and dispersion are needed for nothing else."""
    _, expected = loss_of(path, hidden, weight, labels, return_stats=True, eps=0.5)
    for gradient in GRADIENTS:
        options: Any = {"alpha": 0.0, "gradient": gradient, "eps": 0.5}
        _, stats = loss_of(path, hidden, weight, labels, return_stats=True, **options)
        assert tuple(stats)[:7] == tuple(expected)[:7]


@with_gradient
@pytest.mark.parametrize("valid_tokens", [1, 100, 101, 350])
def test_share_of_the_hardest_hundredth(gradient: Gradient, valid_tokens: int) -> None:
    """By NumPy, from the weights of autograd."""
    g = torch.Generator().manual_seed(valid_tokens)
    logits = (3 * torch.randn(400, V, dtype=torch.float64, generator=g)).requires_grad_()
    labels = torch.randint(V, (400,), generator=g)
    labels[torch.randperm(400, generator=g)[valid_tokens:]] = IGNORED
    coefficients: Any = {"alpha": 1.0, "beta": 0.02, "gamma": 0.1}
    _, stats = nvamp_loss(logits, labels, shift=False, gradient=gradient, return_stats=True, **coefficients)
    ell = oracle.token_losses(logits[labels != IGNORED], labels[labels != IGNORED])
    (w,) = torch.autograd.grad(oracle.surrogate(ell, gradient, **coefficients), ell)
    hardest = np.argsort(-ell.detach().numpy())[: math.ceil(0.01 * valid_tokens)]
    if np.abs(w.numpy()).sum() == 0:  # one token has no dispersion: nothing to share in mode "detached"
        assert stats.hardest_share == 0
    else:
        expected = np.abs(w.numpy())[hardest].sum() / np.abs(w.numpy()).sum()
        assert stats.hardest_share.item() == pytest.approx(expected, rel=1e-9)


@with_gradient
@pytest.mark.parametrize("items", [None, 40])
def test_losses_computed_elsewhere(
    gradient: Gradient, items: int | None, hidden: Tensor, weight: Tensor, labels: Tensor
) -> None:
    """From losses of tokens, whatever is written where none counts, it is the loss of their logits."""
    h = hidden.requires_grad_()
    options: Any = {"gamma": 0.3, "gradient": gradient}
    expected, expected_stats = loss_of(
        "logits", h, weight, labels, num_items_in_batch=items, return_stats=True, **options
    )
    targets = torch.cat([labels[:, 1:], labels.new_full((B, 1), IGNORED)], 1)
    nll = token_nll(h @ weight.T, targets).masked_fill(targets == IGNORED, torch.nan)
    criterion = TokenNVAMPLoss(**options)
    loss, stats = criterion(nll, targets != IGNORED, num_items_in_batch=items, return_stats=True)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(tuple(stats), tuple(expected_stats))
    torch.testing.assert_close(*(torch.autograd.grad(x, h) for x in (loss, expected)))
    everyone = nll.detach()[targets != IGNORED]
    torch.testing.assert_close(criterion(everyone, num_items_in_batch=items), expected.detach())
    assert criterion(everyone.bfloat16()).dtype == torch.float32
    with pytest.raises(TypeError, match="valid must be a tensor, got list"):
        criterion(nll, [True])
    with pytest.raises(ValueError, match="valid must be on the device of nll, cpu, got meta"):
        criterion(nll, torch.ones_like(nll, dtype=torch.bool, device="meta"))
    with pytest.raises(TypeError, match="nll must be a tensor, got list"):
        token_weights(NVAMP(), [1.0, 2.0])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"valid must be bool, shaped like nll \[3, 7\]"):
        criterion(nll, targets)


def assert_nothing_learned(loss: Tensor, *inputs: Tensor) -> None:
    """The loss is 0, and so are the gradients, which there are."""
    loss.backward()
    assert loss == 0
    for x in inputs:
        assert x.grad is not None
        assert not x.grad.any()


@with_path
@with_gradient
def test_nothing_to_learn(path: str, gradient: Gradient, hidden: Tensor, weight: Tensor) -> None:
    h, w = hidden.requires_grad_(), weight.requires_grad_()
    loss, stats = loss_of(path, h, w, torch.full((B, S), IGNORED), gradient=gradient, return_stats=True)
    assert_nothing_learned(loss, h, w)
    assert (stats.num_tokens, stats.max_index, stats.min_weight, stats.max_weight) == (0, -1, 0, 0)
    assert stats.hardest_share == 0


@with_path
@with_gradient
@pytest.mark.parametrize("shape", [(0, 7), (3, 0), (3, 1)])
def test_no_position_to_score(path: str, gradient: Gradient, shape: tuple[int, int]) -> None:
    h, w = torch.randn(*shape, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    loss = loss_of(path, h, w, torch.zeros(shape, dtype=torch.int64), gradient=gradient)
    assert_nothing_learned(loss, h, w)


@with_path
@with_gradient
def test_one_token(path: str, gradient: Gradient) -> None:
    h, w = torch.randn(1, 2, D, requires_grad=True), torch.randn(V, D)
    y = torch.tensor([[0, 3]])
    loss, stats = loss_of(path, h, w, y, gradient=gradient, return_stats=True)
    loss.backward()
    assert stats.dispersion == 0
    torch.testing.assert_close(loss, 0.021 * stats.mean)
    assert h.grad is not None
    assert torch.isfinite(h.grad).all()


@with_path
@with_gradient
def test_nan_shows(path: str, gradient: Gradient, hidden: Tensor, weight: Tensor, labels: Tensor) -> None:
    hidden[0, 0, 0] = torch.nan
    h = hidden.requires_grad_()
    loss = loss_of(path, h, weight, labels, gradient=gradient)
    loss.backward()
    assert loss.isnan()
    assert h.grad is not None
    assert h.grad[0, 0].isnan().all()


def test_float16_sums_do_not_overflow() -> None:
    """The gradient by the weight of the sum of the losses is 160000 here, beyond float16; by their mean it is 20."""
    h = torch.full((1, 8001, 1), 20.0, dtype=torch.float16)
    w = torch.zeros(2, 1, dtype=torch.float16, requires_grad=True)
    linear_nvamp_loss(h, w, torch.zeros(1, 8001, dtype=torch.int64), alpha=0, beta=2, gamma=0).backward()
    assert w.grad is not None
    torch.testing.assert_close(w.grad.float().flatten(), torch.tensor([-20.0, 20.0]), rtol=1e-2, atol=0)


# As a module -------------------------------------------------------------------------------------------


def test_modules_are_the_functions(hidden: Tensor, weight: Tensor, labels: Tensor) -> None:
    options: Any = {"alpha": 0.5, "beta": 1.0, "gamma": 0.1, "eps": 1e-3, "gradient": "token", "z_loss": 0.1}
    module, linear = NVAMPLoss(**options), LinearNVAMPLoss(**options)
    expected, stats = nvamp_loss(
        hidden @ weight.T, labels, return_stats=True, num_items_in_batch=9, **options
    )
    assert module(hidden @ weight.T, labels, num_items_in_batch=9) == expected
    assert module(hidden @ weight.T, labels, 9) == expected  # as compute_loss_func of a Trainer calls it
    assert module(hidden @ weight.T, labels, num_items_in_batch=9, return_stats=True) == (expected, stats)
    torch.testing.assert_close(linear(hidden, weight, labels, num_items_in_batch=9), expected)
    module.gamma = 0.2  # weights may be scheduled
    assert module(hidden @ weight.T, labels) != expected


def test_who_asks_for_statistics_gets_them(hidden: Tensor, weight: Tensor, labels: Tensor) -> None:
    logits = hidden @ weight.T
    nll = token_nll(logits, labels)
    calls: dict[Any, tuple[Tensor, ...]] = {
        NVAMPLoss(): (logits, labels),
        LinearNVAMPLoss(): (hidden, weight, labels),
        TokenNVAMPLoss(): (nll, labels != IGNORED),
    }
    for criterion, args in calls.items():
        expected, expected_stats = criterion(*args, return_stats=True)
        seen: list[NVAMPStats] = []
        criterion.on_stats = seen.append
        torch.testing.assert_close(criterion(*args), expected, rtol=0, atol=0)
        loss, stats = criterion(*args, return_stats=True)
        torch.testing.assert_close(loss, expected, rtol=0, atol=0)
        assert [tuple(s) for s in (stats, *seen)] == [tuple(expected_stats)] * 3


@pytest.mark.parametrize("module", [NVAMPLoss, LinearNVAMPLoss])
def test_a_module_like_any_other(module: type[NVAMPLoss]) -> None:
    criterion = module(0.5, gamma=0.1, gradient="token", softcap=30.0)
    assert repr(criterion) == (
        f"{module.__name__}(alpha=0.5, beta=0.02, gamma=0.1, eps=1e-06, tail=0.0, gradient='token', softcap=30.0)"
    )
    assert not criterion.state_dict()
    assert not list(criterion.parameters())
    for twin in (copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))):
        assert repr(twin) == repr(criterion)
    criterion.load_state_dict({})
    heard = Heard()
    criterion.on_stats = heard.append
    assert copy.deepcopy(criterion).on_stats.__self__ is heard


class Heard(list[Any]):
    """A listener that has more to it than a copy of a criterion wants."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        raise AssertionError("copied")


class Model(HeadAndLoss):
    """It returns the loss and its statistics."""

    def __init__(self, path: str, gradient: Gradient, backend: str) -> None:
        super().__init__(CRITERIA[path](gradient=gradient, z_loss=0.01, backend=backend), D, V)

    def forward(self, hidden: Tensor, labels: Tensor) -> Any:
        return super().forward(hidden, labels, return_stats=True)


@with_path
@pytest.mark.parametrize(
    ("gradient", "backend"),  # of another gradient, the operators of Triton are the same
    [*((gradient, "chunked") for gradient in GRADIENTS), ("scalar", "triton"), ("token", "triton")],
)
def test_compile(path: str, gradient: Gradient, backend: str, hidden: Tensor, labels: Tensor) -> None:
    model = Model(path, gradient, backend)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch, gamma in ((3, 0.001), (2, 0.001), (3, 0.002), (2, 0.5)):  # other sizes, scheduled weights
        model.criterion.gamma = gamma
        h, y = hidden[:batch].float(), labels[:batch]
        loss, stats = model(h, y)
        expected = torch.autograd.grad(loss, list(model.parameters()))
        compiled_loss, compiled_stats = compiled(h, y)
        got = torch.autograd.grad(compiled_loss, list(model.parameters()))
        torch.testing.assert_close(compiled_loss, loss)
        torch.testing.assert_close(tuple(compiled_stats), tuple(stats))
        torch.testing.assert_close(got, expected)


@with_path
@with_fused
def test_other_sizes_do_not_compile_again(path: str, backend: str, hidden: Tensor, labels: Tensor) -> None:
    model = Model(path, "scalar", backend)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.compiler.set_stance("default")
    for batch in (3, 2):  # the second size makes the graph dynamic
        compiled(hidden[:batch].float(), labels[:batch])
    with torch.compiler.set_stance("fail_on_recompile"):
        for x, y in (
            (hidden.repeat(2, 1, 1), labels.repeat(2, 1)),
            (hidden.repeat(3, 1, 1), labels.repeat(3, 1)),
        ):
            compiled(x.float(), y)


@with_path
@with_fused
def test_compile_with_inductor(path: str, backend: str, hidden: Tensor, labels: Tensor) -> None:
    model = Model(path, "scalar", backend)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True)
    loss, _ = model(hidden.float(), labels)
    expected = torch.autograd.grad(loss, list(model.parameters()))
    compiled_loss, _ = compiled(hidden.float(), labels)
    torch.testing.assert_close(compiled_loss, loss)
    torch.testing.assert_close(torch.autograd.grad(compiled_loss, list(model.parameters())), expected)


@with_path
@with_gradient
@with_fused
def test_export(path: str, gradient: Gradient, backend: str, hidden: Tensor, labels: Tensor) -> None:
    model = Model(path, gradient, backend)
    batch = torch.export.Dim("batch")
    program = torch.export.export(model, (hidden.float(), labels), dynamic_shapes=({0: batch}, {0: batch}))
    loss, stats = program.module()(hidden[:2].float(), labels[:2])
    expected, expected_stats = model(hidden[:2].float(), labels[:2])
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(tuple(stats), tuple(expected_stats))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gradient": "exact"}, "gradient must be one of scalar, token, detached, full, got 'exact'"),
        ({"eps": 0}, "eps must be finite and at least 1.2e-38, got 0"),
        ({"eps": 1e-46}, "eps must be finite and at least 1.2e-38, got 1e-46"),
        ({"ignore_index": 2**40}, "ignore_index must be in the range of int32, got 1099511627776"),
        ({"ignore_index": 2**31}, "ignore_index must be in the range of int32, got 2147483648"),
        ({"z_loss": math.inf}, "z_loss must be finite and at least 0, got inf"),
        ({"label_smoothing": 1 + 1e-9}, r"label_smoothing must be in \[0, 1\], got 1.000000001"),
        ({"softcap": -1}, "softcap must be .* got -1"),
        ({"softcap": 0}, "softcap must be finite and above 0, got 0"),
        ({"ignore_index": -(2**31) - 1}, "ignore_index must be in the range of int32, got -2147483649"),
        ({"backend": "cuda"}, "backend must be one of .* got 'cuda'"),
        ({"alpha": float("nan")}, "alpha must be finite and at least 0, got nan"),
        ({"beta": -0.5}, "beta must be finite and at least 0, got -0.5"),
        ({"tail": 1.5}, r"tail must be in \[0, 1\], got 1.5"),
        ({"softcap": 1e300}, "softcap must be a number that float32 can hold, got 1e\\+300"),
        ({"logit_scale": 0}, "logit_scale must not be 0"),
        ({"logit_scale": 1e-46}, "logit_scale must be a number that float32 can hold, got 1e-46"),
        ({"z_loss": 10**400}, "z_loss must be a number that float32 can hold, got 1000"),
        ({"gradient": np.array(["token", "full"])}, "gradient must be one of scalar, token, detached, full"),
    ],
)
def test_bad_options_are_refused_when_they_are_given(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NVAMPLoss(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"label_smoothing": 1, "tail": 1, "eps": TINY, "ignore_index": -(2**31)},
        {"label_smoothing": 0, "tail": 0, "z_loss": 0, "ignore_index": 2**31 - 1},
        {"softcap": HUGE, "logit_scale": -TINY, "alpha": HUGE},
    ],
)
def test_options_at_their_boundaries_are_kept(options: dict[str, Any]) -> None:
    criterion = NVAMPLoss(**options)
    assert {name: getattr(criterion, name) for name in options} == options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ignore_index": -100.0}, "ignore_index must be an int, got -100.0"),
        ({"ignore_index": True}, "ignore_index must be an int, got True"),
        ({"gamma": "0.1"}, "gamma must be a number, got '0.1'"),
        ({"tail": True}, "tail must be a number, got True"),
        ({"shift": 1}, "shift must be True or False, got 1"),
        (
            {"inplace_backward": True},
            r"LinearNVAMPLoss\(\) got an unexpected keyword argument 'inplace_backward'",
        ),
        ({"accum_dtype": "float32"}, "accum_dtype must be a torch.dtype or None, got 'float32'"),
    ],
)
def test_options_of_another_type_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        LinearNVAMPLoss(**options)


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (-1, "num_items_in_batch must be at least 0, got -1"),
        (math.nan, "num_items_in_batch must be at least 0, got nan"),
        (float("inf"), "num_items_in_batch must be a number that float32 can hold, got inf"),
        (10**400, "num_items_in_batch must be a number that float32 can hold, got 1000"),
        (torch.ones(2), r"single number, got shape \[2\]"),
    ],
)
def test_bad_number_of_items(items: Any, message: str, hidden: Tensor, labels: Tensor) -> None:
    with pytest.raises(ValueError, match=message):
        NVAMPLoss()(hidden, labels.clamp(max=D - 1), num_items_in_batch=items)


def test_an_unknown_option_is_named() -> None:
    with pytest.raises(TypeError, match="label_smothing"):
        nvamp_loss(torch.zeros(1, 2, 3), torch.zeros(1, 2, dtype=torch.int64), label_smothing=0.1)  # type: ignore[call-overload]


def test_import_needs_torch_alone() -> None:
    """Whatever torch itself does without is out of reach."""
    others = (
        "triton",
        "transformers",
        "numpy",
        "rich",
        "typer",
        "matplotlib",
        "datasets",
        "tokenizers",
        "accelerate",
    )
    program = f"import sys; sys.modules.update(dict.fromkeys({others!r})); import nvamp; nvamp.NVAMPLoss()"
    done = python("-W", "ignore", "-c", program)
    assert done.returncode == 0, done.stderr


@with_path
def test_scheduled_weights_compile_once(path: str, hidden: Tensor, labels: Tensor) -> None:
    model = Model(path, "scalar", "chunked")
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for step in range(12):  # more than the times that a frame may be compiled
        model.criterion.gamma = 0.1 * (step + 1)
        torch.testing.assert_close(compiled(hidden.float(), labels)[0], model(hidden.float(), labels)[0])


def test_an_option_of_the_objective_is_not_set_beside_it() -> None:
    criterion = Loss(Focal())
    with pytest.raises(
        AttributeError, match=r"gamma is an option of the objective: assign criterion\.objective"
    ):
        criterion.gamma = 0.5  # type: ignore[assignment]
    with pytest.raises(TypeError, match=r"objective must be an NVAMP\(\), got Focal\(gamma=2.0\)"):
        NVAMPLoss().objective = Focal()
    with pytest.raises(TypeError, match="on_stats must be callable or None, got 'x'"):
        criterion.on_stats = "x"  # type: ignore[assignment]


SPARSE = torch.zeros(2, 3, 4).to_sparse()


@pytest.mark.parametrize(
    "name", ["logits", "hidden", "weight", "labels", "nll", "valid", "token_weight", "num_items_in_batch"]
)
@pytest.mark.parametrize(
    "x",
    [SPARSE, torch.nested.nested_tensor([torch.zeros(3, 4)], layout=torch.jagged)],
    ids=["sparse", "nested"],
)
def test_a_tensor_that_is_not_dense_is_named(name: str, x: Tensor) -> None:
    good: dict[str, Any] = {
        "logits": torch.zeros(2, 3, 4),
        "hidden": torch.zeros(2, 3, 4),
        "weight": torch.zeros(4, 4),
        "labels": torch.zeros(2, 3).long(),
        "nll": torch.zeros(2, 3),
        "valid": torch.ones(2, 3, dtype=torch.bool),
        "token_weight": torch.ones(2, 3),
    }
    given = good | {name: x}
    criterion: Any = Loss(TokenWeighted())
    names = ["logits", "labels"]
    if name in ("hidden", "weight"):
        criterion, names = LinearLoss(TokenWeighted()), ["hidden", "weight", "labels"]
    elif name in ("nll", "valid"):
        criterion, names = TokenLoss(TokenWeighted()), ["nll", "valid"]
    items = given.get("num_items_in_batch")
    with pytest.raises(TypeError, match=f"{name} must be a dense tensor, got "):
        criterion(*(given[n] for n in names), num_items_in_batch=items, token_weight=given["token_weight"])


@dataclass(frozen=True)
class Inconsistent(Objective):
    """Says that few tokens have their own weight, and gives each its own."""

    few: int | None

    def few_weights(self, tokens: int) -> int | None:
        return self.few

    def evaluate(self, batch: Batch) -> Result:
        return batch.mean(batch.nll, torch.ones_like(batch.nll))


@pytest.mark.parametrize("few", [0, 1, 2])
def test_a_result_that_is_not_what_the_objective_says(few: int, hidden: Tensor, weight: Tensor) -> None:
    labels = torch.zeros(B, S, dtype=torch.int64)
    with pytest.raises(TypeError, match=r"Inconsistent.evaluate must return a Result with `shared`"):
        LinearLoss(Inconsistent(few))(hidden, weight.requires_grad_(), labels)
    assert LinearLoss(Inconsistent(None))(hidden, weight, labels).isfinite()


@pytest.mark.parametrize("items", ["3", [3], 3j, True, torch.tensor(3j)])
def test_items_of_another_type(items: Any) -> None:
    with pytest.raises(TypeError, match="num_items_in_batch must be"):
        TokenLoss(Focal())(torch.ones(3), num_items_in_batch=items)


def test_fewer_items_than_one_are_not_one() -> None:
    """Such as the sum of the weights of a step."""
    nll, token_weight = torch.tensor([1.0, 2.0]), torch.tensor([0.1, 0.2])
    loss = TokenLoss(TokenWeighted())(nll, token_weight=token_weight, num_items_in_batch=0.3)
    torch.testing.assert_close(loss, torch.tensor(0.5 / 0.3))
