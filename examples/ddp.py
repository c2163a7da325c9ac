"""Data-parallel training with the loss of the whole batch, on any number of processes.

    torchrun --nproc-per-node 2 examples/ddp.py
    python examples/ddp.py

print the same curve, to rounding: the batch is the same, and each process gets the loss of all of it. It
trains the small Llama of `nvamp compare` on the source of Python's standard library, or on `--text`.

Needs: `pip install 'nvamp-loss[study]'`. `nvamp.study` is here for the demo's data and model only.
"""

import argparse
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist
import transformers
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from nvamp import Loss
from nvamp.objectives import NVAMP
from nvamp.study.compare import LR, SEQUENCE
from nvamp.study.corpus import build_corpus
from nvamp.study.models import build_model
from nvamp.study.sources import read_documents

BATCH = 8  # blocks of a step, on all ranks together


def batches(blocks: Tensor, steps: int) -> Iterator[Tensor]:
    """Random blocks [BATCH, sequence] for each step, the same on every rank."""
    g = torch.Generator().manual_seed(0)
    for _ in range(steps):
        yield blocks[torch.randint(len(blocks), (BATCH,), generator=g)]


def train(blocks: Tensor, model: torch.nn.Module, steps: int, device: torch.device) -> None:
    """Trains the model on a part of each batch per rank, and prints the curve on the first rank."""
    group, rank, ranks = None, 0, 1
    if dist.is_initialized():
        group, rank, ranks = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
        model = DistributedDataParallel(model)
    criterion = Loss(NVAMP(), process_group=group)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    for step, batch in enumerate(batches(blocks, steps), start=1):
        mine = batch.chunk(ranks)[rank].to(device)
        optimizer.zero_grad()
        loss = criterion(model(input_ids=mine).logits, mine)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if rank == 0:
            print(f"step {step}: loss {loss.item():.5f}, gradient norm {norm.item():.5f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=40, help="default: 40")
    parser.add_argument("--text", action="append", default=[], help="a file or directory of text; repeat it")
    options = parser.parse_args()
    if BATCH % (ranks := int(os.environ.get("WORLD_SIZE", "1"))):
        parser.error(f"{ranks} processes cannot share a batch of {BATCH} blocks in equal parts")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    if not torch.cuda.is_available():
        device = torch.device("cpu")
    corpus = build_corpus(*read_documents(options.text), SEQUENCE)
    transformers.set_seed(0)
    model = build_model(None, corpus).to(device)
    if not dist.is_torchelastic_launched():
        return train(corpus.train, model, options.steps, device)
    dist.init_process_group(device_id=device if device.type == "cuda" else None)
    try:
        train(corpus.train, model, options.steps, device)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
