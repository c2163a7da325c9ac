import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from nvamp import NVAMPLoss
from nvamp.study import StudyError
from nvamp.study.losses import parse_loss, parse_losses


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Float64, by definition: [valid tokens] nats of the shifted labels."""
    logp = logits.double().log_softmax(-1)[:, :-1].flatten(0, 1)
    labels = labels[:, 1:].flatten()
    keep = labels != -100
    return -logp[keep].gather(1, labels[keep, None])[:, 0]


FORMULAS = {
    "ce": lambda nll: nll,
    "focal": lambda nll: (1 - (-nll).exp()) ** 2 * nll,
    "focal:gamma=0.5": lambda nll: (1 - (-nll).exp()) ** 0.5 * nll,
    "focal:gamma=3": lambda nll: (1 - (-nll).exp()) ** 3 * nll,
    "dft": lambda nll: (-nll).exp().detach() * nll,
}


@pytest.mark.parametrize("spec", FORMULAS)
@pytest.mark.parametrize("items", [None, 29])
def test_value_and_gradient_are_those_of_the_formula(spec: str, items: int | None) -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, 9, 13, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(13, (3, 9))
    labels[1, 4:] = -100
    losses = token_losses(logits, labels)
    expected = FORMULAS[spec](losses).sum() / (items or len(losses))
    (expected_grad,) = torch.autograd.grad(expected, logits)

    value = parse_loss(spec).criterion(logits, labels, num_items_in_batch=items)
    (grad,) = torch.autograd.grad(value, logits)

    torch.testing.assert_close(value.double(), expected.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-5, atol=1e-8)


def test_focal_gradient_is_finite_where_the_model_is_certain() -> None:
    logits = torch.zeros(1, 3, 5, requires_grad=True)
    certain = logits + 200 * torch.nn.functional.one_hot(torch.tensor([[1, 2, 0]]), 5)
    parse_loss("focal:gamma=0.5").criterion(certain, torch.tensor([[0, 1, 2]])).backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_nvamp_options_reach_the_criterion() -> None:
    criterion = parse_loss("nvamp:gamma=0.05,gradient=token,alpha=0.5").criterion
    assert isinstance(criterion, NVAMPLoss)
    assert (criterion.alpha, criterion.beta, criterion.gamma) == (0.5, 0.02, 0.05)
    assert criterion.gradient == "token"


def test_a_loss_has_one_name_however_it_is_spelled() -> None:
    spellings = [
        "nvamp:gamma=0.05,gradient=token",
        "nvamp: gradient=token, gamma=5e-2",
        " nvamp:gradient=token,gamma=.05",
    ]
    assert {parse_loss(spelling).name for spelling in spellings} == {"nvamp:gamma=0.05,gradient=token"}
    for spec in ("nvamp:", "nvamp:alpha=1", "nvamp:beta=0.02,gamma=1e-3,eps=1e-06,gradient=scalar"):
        assert parse_loss(spec).name == "nvamp"
    assert parse_loss("focal:gamma=2").name == "focal"
    assert parse_loss("focal:gamma=3").name == "focal:gamma=3"
    assert parse_loss("focal:gamma=0.12345678").name == "focal:gamma=0.12345678"


@given(st.floats(0, 1e6), st.floats(0, 1e6))
@example(0.1, 0.1000001)
@example(0.0, -0.0)
def test_different_options_have_different_files(a: float, b: float) -> None:
    first, second = (parse_loss(f"focal:gamma={x!r}") for x in (a, b))
    assert (first.slug == second.slug) == (first.name == second.name) == (a == b)
    assert not set(first.slug) & set(":,/\\ ")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("bogus", "--loss bogus: unknown loss 'bogus', known are ce, nvamp, focal, dft"),
        ("", "--loss : unknown loss '', known are ce, nvamp, focal, dft"),
        ("nvamp:delta=1", "unknown option 'delta', nvamp takes alpha, beta, gamma, eps, gradient"),
        ("ce:gamma=1", "unknown option 'gamma', ce takes no options"),
        ("focal:gamma=much", "gamma must be a number, got 'much'"),
        ("focal:gamma=", "expected key=value, got 'gamma='"),
        ("focal:gamma", "expected key=value, got 'gamma'"),
        ("focal:gamma=-1", "gamma must not be negative, got -1"),
        ("focal:gamma=nan", "gamma must be finite, got nan"),
        ("focal:gamma=inf", "gamma must be finite, got inf"),
        ("nvamp:alpha=inf", "alpha must be finite, got inf"),
        ("nvamp:eps=inf", "eps must be finite, got inf"),
        ("nvamp:gradient=upward", "gradient must be one of scalar, token, detached, full"),
    ],
)
def test_a_bad_spec_is_told_in_one_line(spec: str, message: str) -> None:
    with pytest.raises(StudyError) as error:
        parse_loss(spec)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_loss_named_twice() -> None:
    with pytest.raises(StudyError, match=r"^--loss nvamp:gamma=0.10,alpha=1: named twice$"):
        parse_losses(["nvamp:gamma=0.1", "ce", "nvamp:gamma=0.10,alpha=1"])
