"""Training with Lightning, with the loss of the whole batch on any number of processes.

    python examples/lightning_module.py
    python examples/lightning_module.py --devices 2

print the same losses, to rounding. It trains the small Llama of `nvamp compare` on the source of Python's
standard library, or on `--text`.

Needs: `pip install 'nvamp-loss[study]' lightning`. `nvamp.study` is here for the demo's data and model only.
"""

import argparse
from typing import Any

import lightning
import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler

from nvamp import Loss
from nvamp.objectives import NVAMP
from nvamp.study.compare import LR, SEQUENCE
from nvamp.study.corpus import build_corpus
from nvamp.study.models import build_model
from nvamp.study.sources import read_documents

BATCH = 8  # blocks of a step, on all processes together


class LanguageModel(lightning.LightningModule):
    """A causal language model, its loss, and the blocks [blocks, sequence] to train on, `batch` in a step.

    Lightning divides the loss by the number of micro-batches if it accumulates gradients, and DDP takes the
    mean over processes. Both are right for a loss that is already a mean, as this one is without
    `num_items_in_batch`: the model is trained on the mean of the micro-batches' losses.
    """

    def __init__(self, model: nn.Module, criterion: Loss, blocks: Tensor, batch: int) -> None:
        super().__init__()
        self.model = model
        self.criterion = criterion
        self.blocks = blocks
        self.batch = batch  # on all processes together

    def on_fit_start(self) -> None:
        if self.trainer.world_size > 1:  # the group exists only now
            self.criterion.process_group = dist.group.WORLD

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss, stats = self.criterion(self.model(input_ids=batch).logits, batch, return_stats=True)
        self.log("loss", loss)
        # These are tensors: nothing waits for the device until the logger reads them.
        self.log_dict({name: getattr(stats, name) for name in ("mean", "std", "dispersion", "max")})
        return loss

    def train_dataloader(self) -> DataLoader[Tensor]:
        ranks = self.trainer.world_size
        # A step has the same rows as on one process; Lightning's own sampler would shuffle them.
        sampler = DistributedSampler(self.blocks, ranks, self.global_rank, shuffle=False, drop_last=True)
        return DataLoader(self.blocks, self.batch // ranks, sampler=sampler, drop_last=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=LR)


class Printed(lightning.pytorch.callbacks.Callback):
    """Prints the loss of each step on the first process."""

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.is_global_zero:
            loss, std = (trainer.callback_metrics[name].item() for name in ("loss", "std"))
            print(f"step {trainer.global_step}: loss {loss:.5f}, deviation {std:.5f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="default: 20")
    parser.add_argument("--devices", type=int, default=1, help="processes; default: 1")
    parser.add_argument("--text", action="append", default=[], help="a file or directory of text; repeat it")
    options = parser.parse_args()
    if BATCH % options.devices:
        parser.error(f"{options.devices} processes cannot share a batch of {BATCH} blocks in equal parts")
    corpus = build_corpus(*read_documents(options.text), SEQUENCE)
    transformers.set_seed(0)
    module = LanguageModel(build_model(None, corpus), Loss(NVAMP()), corpus.train, BATCH)
    trainer = lightning.Trainer(
        max_steps=options.steps,
        devices=options.devices,
        strategy="ddp" if options.devices > 1 else "auto",
        gradient_clip_val=1.0,
        callbacks=[Printed()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module)


if __name__ == "__main__":
    main()
