"""The integration with torchtitan: its own loss module, without the rest of it."""

import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nvamp.functional import nvamp_loss

if sys.version_info < (3, 11):
    pytest.skip("torchtitan needs Python 3.11", allow_module_level=True)
from torchtitan.components.loss import BaseLoss, ChunkedLossWrapper, CrossEntropyLoss

from nvamp.integrations.torchtitan import NVAMPLoss
from tests.integrations.tiny import CROSS_ENTROPY, IGNORED

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
    ours, theirs = NVAMPLoss.Config(**CROSS_ENTROPY), CrossEntropyLoss.Config()
    if chunks is not None:
        ours, theirs = (ChunkedLossWrapper.Config(num_chunks=chunks, loss_fn=c) for c in (ours, theirs))
    loss, gradients = step(ours, micro_batches)
    expected, expected_gradients = step(theirs, micro_batches)
    assert len(gradients) == 3
    assert loss == pytest.approx(expected, rel=1e-6)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-5, atol=1e-7)


def test_every_term(micro_batches: list[tuple[Tensor, Tensor]]) -> None:
    options: Any = {"alpha": 0.7, "beta": 0.3, "gamma": 0.2, "eps": 1e-3, "gradient": "token"}
    head = nn.Linear(D, V)
    loss_fn = NVAMPLoss.Config(**options).build(compile_config=None)
    for hidden, labels in micro_batches:
        for tokens in (None, torch.tensor(50)):
            loss, metrics = loss_fn(head(hidden), labels, tokens)
            expected = nvamp_loss(
                head(hidden), labels, shift=False, num_items_in_batch=1 if tokens is None else 50, **options
            )
            assert metrics == {}
            torch.testing.assert_close(loss, expected)
            got, wanted = (torch.autograd.grad(x, head.weight) for x in (loss, expected))
            torch.testing.assert_close(got, wanted)
