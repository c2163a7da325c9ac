import json
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

import nvamp
from nvamp.objectives import CrossEntropy
from nvamp.objectives.nvamp import NVAMP
from nvamp.study import StudyError
from nvamp.study.losses import KNOWN, MODES, in_words, parse_loss, parse_losses


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


@pytest.mark.parametrize("spec", KNOWN)
def test_without_a_valid_label_the_loss_is_zero(spec: str) -> None:
    logits = torch.randn(2, 5, 7, requires_grad=True)
    value = parse_loss(spec).criterion(logits, torch.full((2, 5), -100))
    (grad,) = torch.autograd.grad(value, logits)
    assert value == 0
    assert not grad.any()


def test_focal_gradient_is_finite_where_the_model_is_certain() -> None:
    logits = torch.zeros(1, 3, 5, requires_grad=True)
    certain = logits + 200 * torch.nn.functional.one_hot(torch.tensor([[1, 2, 0]]), 5)
    parse_loss("focal:gamma=0.5").criterion(certain, torch.tensor([[0, 1, 2]])).backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("name", KNOWN)
def test_every_objective_that_text_is_enough_for_can_be_trained_with(name: str) -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 9, 13, requires_grad=True)
    loss = parse_loss(name)
    loss.criterion(logits, torch.randint(13, (2, 9)), num_items_in_batch=16).backward()
    assert loss.name == name
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert logits.grad[:, :-1].any()


def test_options_reach_the_criterion() -> None:
    loss = parse_loss("nvamp:gamma=0.05,gradient=token,alpha=0.5,label_smoothing=0.1,softcap=30")
    assert isinstance(loss.criterion, nvamp.Loss)
    for criterion in (loss.criterion, loss.linear):
        assert criterion.objective == NVAMP(alpha=0.5, gamma=0.05, gradient="token")
        assert (criterion.label_smoothing, criterion.softcap, criterion.z_loss) == (0.1, 30, 0)


def test_label_smoothing_is_that_of_pytorch() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 9, 13), torch.randint(13, (2, 9))
    expected = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), label_smoothing=0.1
    )
    torch.testing.assert_close(parse_loss("ce:label_smoothing=0.1").criterion(logits, labels), expected)
    assert isinstance(parse_loss("ce:label_smoothing=0.1").spec.objective, CrossEntropy)


def test_the_modes_of_nvamp() -> None:
    assert MODES == ("nvamp", "nvamp:gradient=token", "nvamp:gradient=detached", "nvamp:gradient=full")


def test_the_names_in_committed_results_are_canonical() -> None:
    results = Path(__file__).parents[2] / "benchmarks" / "evidence" / "results"
    runs = [run for path in results.glob("*.json") for run in json.loads(path.read_text())["runs"]]
    names = {name for run in runs for name in run["loss"].split(">")}  # one after the other
    assert len(names) > 10
    assert {name: parse_loss(name).name for name in names} == {name: name for name in names}


def test_a_loss_has_one_name_however_it_is_spelled() -> None:
    spellings = [
        "nvamp:gamma=0.05,gradient=token",
        "nvamp: gradient=token, gamma=5e-2",
        " nvamp:gradient=token,gamma=.05",
    ]
    assert {parse_loss(spelling).name for spelling in spellings} == {"nvamp:gamma=0.05,gradient=token"}
    for spec in ("nvamp:", "nvamp:alpha=1", "nvamp:beta=0.02,gamma=1e-3,eps=1e-06,gradient=scalar"):
        assert parse_loss(spec).name == "nvamp"
    spelled = ("ce:z_loss=1e-4,label_smoothing=0.1", "ce:label_smoothing=.1,softcap=none,z_loss=0.0001")
    assert {parse_loss(spec).name for spec in spelled} == {"ce:label_smoothing=0.1,z_loss=0.0001"}
    assert parse_loss("focal:gamma=2").name == "focal"
    assert parse_loss("focal:gamma=3").name == "focal:gamma=3"
    assert parse_loss("focal:gamma=0.12345678").name == "focal:gamma=0.12345678"


numbers = st.just(0.0) | st.floats(1e-30, 1e6)


@given(numbers, numbers)
@example(0.1, 0.1000001)
@example(0.0, -0.0)
def test_different_options_have_different_files(a: float, b: float) -> None:
    first, second = (parse_loss(f"focal:gamma={x!r}") for x in (a, b))
    assert (first.slug == second.slug) == (first.name == second.name) == (a == b)
    assert not set(first.slug) & set(":,/\\ ")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("bogus", "unknown objective 'bogus', known are ce, nvamp, "),
        ("", "unknown objective '', known are ce, nvamp, "),
        (
            "nvamp:delta=1",
            "unknown option 'delta', nvamp takes alpha, beta, gamma, eps, tail, gradient, label_smoothing",
        ),
        ("ce:gamma=1", "unknown option 'gamma', ce takes label_smoothing, z_loss, softcap, logit_scale"),
        ("ce:label_smoothing=2", "label_smoothing must be in [0, 1], got 2.0"),
        ("focal:gamma=much", "gamma must be a number, got 'much'"),
        ("focal:gamma=", "expected option=value, got 'gamma='"),
        ("focal:gamma", "expected option=value, got 'gamma'"),
        ("focal:gamma=-1", "gamma must be finite and at least 0, got -1.0"),
        ("focal:gamma=nan", "gamma must be finite and at least 0, got nan"),
        ("nvamp:alpha=inf", "alpha must be finite and at least 0, got inf"),
        ("nvamp:eps=inf", "eps must be finite and at least "),
        ("nvamp:gradient=upward", "gradient must be one of scalar, token, detached, full"),
        ("token_weighted", "needs token_weight of every token, which text alone does not have"),
        (
            "clipped_policy:kl=0.1",
            "needs advantage, ref_logprob of every token, which text alone does not have",
        ),
    ],
)
def test_a_bad_spec_is_reported_in_one_line(spec: str, message: str) -> None:
    with pytest.raises(StudyError) as error:
        parse_loss(spec)
    assert str(error.value).startswith(f"--loss {spec}: {message}")
    assert "\n" not in str(error.value)


def test_a_loss_named_twice() -> None:
    with pytest.raises(StudyError, match=r"^--loss nvamp:gamma=0.10,alpha=1: named twice$"):
        parse_losses(["nvamp:gamma=0.1", "ce", "nvamp:gamma=0.10,alpha=1"])


def test_a_learning_rate_after_the_loss() -> None:
    loss = parse_loss("nvamp:tail=0.05,gamma=0.04@2e-4")
    assert (loss.lr, loss.name) == (2e-4, "nvamp:gamma=0.04,tail=0.05@0.0002")
    assert loss.slug == "nvamp-gamma=0.04-tail=0.05@0.0002"
    assert loss.spec == parse_loss("nvamp:gamma=0.04,tail=0.05").spec
    assert len(parse_losses(["nvamp", "nvamp@1e-4", "nvamp@2e-4"])) == 3
    with pytest.raises(StudyError, match=r"^--loss ce@1e-3: named twice$"):
        parse_losses(["ce@0.001", "ce@1e-3"])
    for rate in ("", "x", "0", "-1", "nan", "inf"):
        with pytest.raises(StudyError, match=f"^--loss ce@{rate}: expected a positive learning rate after @"):
            parse_loss(f"ce@{rate}")


def test_the_name_of_a_loss_in_words() -> None:
    assert in_words("ce") == "cross-entropy"
    assert in_words("nvamp:gamma=0.04,tail=0.05") == "NVAMP with gamma 0.04, tail 0.05"
    assert in_words("dft@0.001") == "DFT at a learning rate of 0.001"
    assert in_words("focal:label_smoothing=0.1") == "focal with label smoothing 0.1"
