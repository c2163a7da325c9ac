"""The example for Lightning, against loops by hand."""

from typing import Any

import lightning
import pytest
import torch
from torch import Tensor

from examples.lightning_module import LanguageModel
from nvamp import Loss
from nvamp.objectives import DFT, CrossEntropy, Objective
from tests.integrations.tiny import SEQ, V, assert_same, tiny, weights_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
]
STEPS, BATCH = 3, 8


class WithPlainDescent(LanguageModel):
    """Its optimizer shows the size of the gradient."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def own_loss(model: Any, batch: Tensor) -> Tensor:
    loss: Tensor = model(input_ids=batch, labels=batch).loss
    return loss


def dft_loss(model: Any, batch: Tensor) -> Tensor:
    logits = model(input_ids=batch).logits[:, :-1]
    nll = torch.nn.functional.cross_entropy(logits.mT, batch[:, 1:], reduction="none")
    return ((-nll).exp().detach() * nll).mean()


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(("objective", "by_hand"), [(CrossEntropy(), own_loss), (DFT(), dft_loss)])
def test_training_is_the_loop_by_hand(objective: Objective, by_hand: Any, accumulate: int) -> None:
    blocks = torch.randint(V, (STEPS * BATCH, SEQ), generator=torch.Generator().manual_seed(0))
    model, expected = tiny(), tiny()
    start = weights_of(model)
    trainer = lightning.Trainer(
        max_steps=STEPS,
        accumulate_grad_batches=accumulate,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(WithPlainDescent(model, Loss(objective), blocks, BATCH // accumulate))
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.1)
    losses: list[Tensor] = []
    for batch in blocks.split(BATCH):
        losses.append(by_hand(expected, batch))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert trainer.global_step == STEPS
    assert_same(weights_of(model) - start, weights_of(expected) - start)
    logged: Any = trainer.callback_metrics
    if accumulate == 1:
        torch.testing.assert_close(logged["loss"], losses[-1].detach(), rtol=1e-5, atol=0)
    if objective == CrossEntropy():
        torch.testing.assert_close(logged["mean"], logged["loss"])
