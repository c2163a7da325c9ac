"""A training loop of your own with Accelerate, with the loss of the whole batch on any number of processes.

    accelerate launch --num_processes 2 examples/accelerate_loop.py
    python examples/accelerate_loop.py

print the same curve, to rounding. Each step accumulates the gradients of two micro-batches. It trains the
small Llama of `nvamp compare` on the source of Python's standard library, or on `--text`.

Needs: `pip install 'nvamp-loss[study]'`. `nvamp.study` is here for the demo's data and model only.
"""

import argparse
from collections.abc import Iterator

import torch
import torch.distributed as dist
import transformers
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from torch import Tensor, nn
from torch.utils.data import DataLoader

from nvamp import Loss
from nvamp.objectives import NVAMP
from nvamp.study.compare import LR, SEQUENCE
from nvamp.study.corpus import build_corpus
from nvamp.study.models import build_model
from nvamp.study.sources import read_documents

MICRO_BATCH = 8  # blocks, on all processes together


def train(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    blocks: Tensor,
    criterion: Loss,
    steps: int,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Trains the model; yields the loss of each step on all processes together, and the gradient's norm."""
    shuffled = DataLoader(
        blocks, MICRO_BATCH, shuffle=True, drop_last=True, generator=torch.Generator().manual_seed(0)
    )
    model, optimizer, loader = accelerator.prepare(model, optimizer, shuffled)
    batches = forever(loader)
    for _ in range(steps):
        step = [next(batches) for _ in range(accelerator.gradient_accumulation_steps)]
        # Every micro-batch is divided by the number of tokens of the step, so that their losses add up.
        tokens = torch.stack([(batch[:, 1:] != criterion.ignore_index).sum() for batch in step]).sum()
        tokens = accelerator.gather(tokens[None]).sum()
        total = torch.zeros((), device=accelerator.device)
        for batch in step:
            with accelerator.accumulate(model):
                loss = criterion(model(input_ids=batch).logits, batch, num_items_in_batch=tokens)
                # `backward` divides by the number of micro-batches, but the loss is already divided by the
                # tokens of them all. DDP takes the mean over processes, which the process group allows for.
                accelerator.backward(loss * accelerator.gradient_accumulation_steps)
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            total += loss.detach()
        yield total, norm


def forever(loader: DataLoader[Tensor]) -> Iterator[Tensor]:
    """Epoch after epoch."""
    while True:
        yield from loader


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="default: 20")
    parser.add_argument("--text", action="append", default=[], help="a file or directory of text; repeat it")
    options = parser.parse_args()
    accelerator = Accelerator(
        gradient_accumulation_steps=2,
        # A batch is split over the processes.
        dataloader_config=DataLoaderConfiguration(split_batches=True),
    )
    corpus = build_corpus(*read_documents(options.text), SEQUENCE)
    transformers.set_seed(0)
    model = build_model(None, corpus)
    criterion = Loss(NVAMP(), process_group=dist.group.WORLD if accelerator.use_distributed else None)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    curve = train(accelerator, model, optimizer, corpus.train, criterion, options.steps)
    for step, (loss, norm) in enumerate(curve, start=1):
        accelerator.print(f"step {step}: loss {loss.item():.5f}, gradient norm {norm.item():.5f}", flush=True)
    accelerator.end_training()


if __name__ == "__main__":
    main()
