"""Ranks in the tests: real processes of one gloo group."""

import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

T = TypeVar("T")

# Imported once: each rank is a fork of a process that has them.
multiprocessing.set_forkserver_preload(["nvamp", "torch._dynamo", "torch.distributed.fsdp", "triton"])


def on_ranks(function: Callable[[int, int], T], world: int, folder: Path) -> list[T]:
    """What function(rank, world) returns in each of that many processes of one group.

    The function and what it returns are pickled; `folder` is empty before, and is where the ranks meet.
    """
    mp.start_processes(  # type: ignore[no-untyped-call]
        _rank, (function, world, folder), nprocs=world, start_method="forkserver"
    )
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]


def _rank(rank: int, function: Callable[[int, int], object], world: int, folder: Path) -> None:
    # For the Trainer and Accelerate. The port is not used: the ranks meet at a file.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    torch.save(function(rank, world), folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # where Python ends, a group that something still holds would abort the process
