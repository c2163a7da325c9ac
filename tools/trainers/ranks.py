"""Several processes on this machine that find each other as those of `torchrun` do."""

import os
import socket
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.multiprocessing as mp


def on_ranks(world: int, function: Callable[..., Any], *arguments: Any) -> Any:
    """What `function(*arguments)` returns on rank 0 of `world` new processes.

    Raises:
        torch.multiprocessing.ProcessRaisedException: one of them failed.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    with TemporaryDirectory() as folder:
        file = f"{folder}/result"
        mp.spawn(_rank, (world, port, file, function, arguments), nprocs=world)  # type: ignore[attr-defined, no-untyped-call]
        return torch.load(Path(file), weights_only=False)


def _rank(
    rank: int, world: int, port: int, file: str, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    where = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
    os.environ |= where | {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world)}
    result = function(*arguments)
    if rank == 0:
        torch.save(result, file)
