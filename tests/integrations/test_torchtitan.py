"""The integration with torchtitan: its own loss module, without the rest of it."""

import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

if sys.version_info < (3, 11):
    pytest.skip("torchtitan needs Python 3.11", allow_module_level=True)
from torchtitan.components.loss import BaseLoss, ChunkedLossWrapper, CrossEntropyLoss

from nvamp import Loss
from nvamp.integrations import torchtitan
from nvamp.integrations.torchtitan import TitanLoss, criterion_of
from nvamp.objectives import CrossEntropy
from nvamp.objectives.spec import parse_loss
from tests.integrations.tiny import IGNORED

BATCH, SEQ, D, V = 4, 8, 5, 13


@pytest.fixture
def micro_batches() -> list[tuple[Tensor, Tensor]]:
    """(hidden [BATCH, SEQ, D], labels [BATCH, SEQ]) with unequal numbers of scored tokens."""
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(V, (2, BATCH, SEQ), generator=g)
    labels[0, :3, 2:] = IGNORED
    return list(zip(torch.randn(2, BATCH, SEQ, D, generator=g), labels, strict=True))


def step(config: BaseLoss.Config, micro_batches: list[tuple[Tensor, Tensor]]) -> tuple[float, list[Tensor]]:
    """The loss and the gradients of an optimizer step, as torchtitan's trainer takes it."""
    torch.manual_seed(0)
    body, head = nn.Linear(D, D), nn.Linear(D, V, bias=False)
    loss_fn = config.build(compile_config=None)
    tokens = torch.stack([(labels != IGNORED).sum() for _, labels in micro_batches]).sum()
    chunked = isinstance(loss_fn, ChunkedLossWrapper)
    if chunked:
        loss_fn.set_lm_head(head)
    total = 0.0
    for hidden, labels in micro_batches:
        pred = body(hidden) if chunked else head(body(hidden))
        loss, _ = loss_fn(pred, labels, tokens, positions=None)
        loss.backward()
        total += loss.item()
    gradients = [p.grad for p in (*body.parameters(), *head.parameters())]
    return total, [g for g in gradients if g is not None]


@pytest.mark.parametrize("chunks", [None, 4])
def test_cross_entropy_is_torchtitans_own(
    chunks: int | None, micro_batches: list[tuple[Tensor, Tensor]]
) -> None:
    ours, theirs = TitanLoss.Config(loss="ce"), CrossEntropyLoss.Config()
    if chunks is not None:
        ours, theirs = (ChunkedLossWrapper.Config(num_chunks=chunks, loss_fn=c) for c in (ours, theirs))
    loss, gradients = step(ours, micro_batches)
    expected, expected_gradients = step(theirs, micro_batches)
    assert len(gradients) == 3
    assert loss == pytest.approx(expected, rel=1e-6)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-5, atol=1e-7)


# Texts, each with the inputs that it takes.
LOSSES: dict[str, tuple[str, ...]] = {
    "nvamp:alpha=0.7,beta=0.3,gamma=0.2,eps=0.001,gradient=token": (),
    "tail:share=0.2,label_smoothing=0.1": (),
    "entropy:softcap=2": (),
    "token_weighted:z_loss=0.01": ("token_weight",),
    "clipped_policy": ("advantage", "old_logprob"),
}


@pytest.mark.parametrize("text", LOSSES)
@pytest.mark.parametrize("tokens", [None, 50])
def test_every_loss(text: str, tokens: int | None, micro_batches: list[tuple[Tensor, Tensor]]) -> None:
    torch.manual_seed(0)
    head = nn.Linear(D, V)
    loss_fn = TitanLoss.Config(loss=text).build(compile_config=None)
    objective, options = parse_loss(text)
    for hidden, labels in micro_batches:
        inputs: Any = {name: torch.randn(BATCH, SEQ) for name in LOSSES[text]}
        number = None if tokens is None else torch.tensor(tokens)
        loss, metrics = loss_fn(head(hidden), labels, number, positions=None, **inputs)
        criterion = Loss(objective, shift=False, **options)
        expected = criterion(head(hidden), labels, 1 if tokens is None else tokens, **inputs)
        assert metrics == {}
        torch.testing.assert_close(loss, expected)
        got, wanted = (torch.autograd.grad(x, head.weight) for x in (loss, expected))
        torch.testing.assert_close(got, wanted)


def test_chunks_have_their_part_of_the_inputs(micro_batches: list[tuple[Tensor, Tensor]]) -> None:
    """A sum over tokens is the same in chunks as in one."""
    torch.manual_seed(0)
    head = nn.Linear(D, V, bias=False)
    config = TitanLoss.Config(loss="token_weighted")
    chunked = ChunkedLossWrapper.Config(num_chunks=4, loss_fn=config).build(compile_config=None)
    chunked.set_lm_head(head)
    hidden, labels = micro_batches[0][0].requires_grad_(), micro_batches[0][1]
    weight, tokens = torch.rand(BATCH, SEQ), (labels != IGNORED).sum()
    loss, _ = chunked(hidden, labels, tokens, token_weight=weight)
    loss.backward()
    found = [loss.detach(), hidden.grad, head.weight.grad]
    whole, _ = config.build(compile_config=None)(head(hidden), labels, tokens, token_weight=weight)
    expected = [whole.detach(), *torch.autograd.grad(whole, (hidden, head.weight))]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("chunks", [None, 4])
def test_metrics_add_up(chunks: int | None, micro_batches: list[tuple[Tensor, Tensor]]) -> None:
    """Over chunks and micro-batches; the loss stays as it is."""
    torch.manual_seed(0)
    head = nn.Linear(D, V, bias=False)
    found: list[dict[str, Tensor]] = []
    losses = []
    tokens = torch.stack([(labels != IGNORED).sum() for _, labels in micro_batches]).sum()
    for metrics in (True, False):
        config: BaseLoss.Config = TitanLoss.Config(loss="nvamp:gradient=token", metrics=metrics)
        if chunks is not None:
            config = ChunkedLossWrapper.Config(num_chunks=chunks, loss_fn=config)
        loss_fn = config.build(compile_config=None)
        if isinstance(loss_fn, ChunkedLossWrapper):
            loss_fn.set_lm_head(head)
        for hidden, labels in micro_batches:
            loss, values = loss_fn(hidden if chunks else head(hidden), labels, tokens)
            losses.append(loss.detach())
            found.append(values)
    assert losses[:2] == losses[2:]
    assert found[2:] == [{}, {}]
    logits = (
        torch.cat([head(hidden)[labels != IGNORED] for hidden, labels in micro_batches]).double().detach()
    )
    targets = torch.cat([labels[labels != IGNORED] for _, labels in micro_batches])
    p = logits.softmax(-1)
    nll = nn.functional.cross_entropy(logits, targets, reduction="none")
    expected = {
        "nvamp_cross_entropy/mean": nll.mean(),
        "nvamp_accuracy/mean": (p.argmax(-1) == targets).double().mean(),
        "nvamp_entropy/mean": torch.special.entr(p).sum(-1).mean(),
    }
    assert expected["nvamp_accuracy/mean"] > 0
    summed = {name: (found[0][name] + found[1][name]).double() for name in expected}
    torch.testing.assert_close(summed, expected, rtol=1e-5, atol=0)
    largest = torch.maximum(found[0]["nvamp_loss/max"], found[1]["nvamp_loss/max"])
    torch.testing.assert_close(largest.double(), nll.max(), rtol=1e-5, atol=0)


def test_the_criterion_is_found() -> None:
    config = TitanLoss.Config(loss="ce")
    for made in (config, ChunkedLossWrapper.Config(loss_fn=config)):
        assert criterion_of(made.build(compile_config=None)).objective == CrossEntropy()
    for theirs in (CrossEntropyLoss.Config(), ChunkedLossWrapper.Config()):
        with pytest.raises(TypeError, match="must be a TitanLoss or a wrapper of one, got CrossEntropyLoss"):
            criterion_of(theirs.build(compile_config=None))


@pytest.mark.parametrize("text", ["nvmap", "nvamp:gradient=tokens", "ce:z_loss=-1"])
def test_a_wrong_text_is_an_error_of_the_configuration(text: str) -> None:
    with pytest.raises(ValueError, match=text):
        TitanLoss.Config(loss=text)


def test_a_missing_input_is_named(micro_batches: list[tuple[Tensor, Tensor]]) -> None:
    hidden, labels = micro_batches[0]
    logits = nn.Linear(D, V)(hidden)
    with pytest.raises(TypeError, match="token_weight is missing"):
        TitanLoss.Config(loss="token_weighted").build(compile_config=None)(logits, labels)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("ce:label_smoothing=0.1,z_loss=0.1", "label_smoothing, z_loss"),
        ("entropy", "the entropy"),
        ("ce", "metrics"),
    ],
)
def test_what_torchtitan_does_not_gather(
    text: str, what: str, micro_batches: list[tuple[Tensor, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torchtitan, "spmd_mesh_size", lambda axis: 2)
    hidden, labels = micro_batches[0]
    logits = nn.Linear(D, V)(hidden)
    with pytest.raises(NotImplementedError, match=f"needs {what}, which torchtitan does not compute"):
        TitanLoss.Config(loss=text, metrics=what == "metrics").build(compile_config=None)(logits, labels)
    loss, _ = TitanLoss.Config(loss="ce").build(compile_config=None)(logits, labels)
    expected, _ = CrossEntropyLoss.Config().build(compile_config=None)(logits, labels)
    torch.testing.assert_close(loss, expected)
