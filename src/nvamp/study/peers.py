"""The ranks of `torchrun`: they share the runs of a study, and each trains its own by itself.

There is no process group. The ranks meet at the store that `torchrun` keeps for them: the first one tells the
others what there is to do, and no more than one tells the user what went wrong.
"""

import json
import os
import signal
import time
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch.distributed as dist

POLL = 0.1  # seconds; blocking calls of the store would hold back signals

# All of these are set by `torchrun`; other launchers and old shells may leave some of them.
_MEETING = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# By these the libraries below would take several runs for one of several processes.
_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID")


@dataclass(frozen=True)
class Peers:
    """Which of how many processes this one is.

    Attributes:
        store: where they meet, a `torch.distributed.Store`; `None` for a process on its own.
    """

    rank: int = 0
    world: int = 1
    store: Any = None

    def of_first(self, make: Callable[[], Any]) -> Any:
        """What `make` returns on the first rank, where alone it is called; JSON. The others wait for it."""
        if self.store is None:
            return make()
        if self.rank == 0:
            self.store.set("first", json.dumps(make()))
        while not self.store.check(["first"]):
            time.sleep(POLL)
        return json.loads(self.store.get("first"))

    def first_to_fail(self) -> bool:
        """Whether no other rank has called this before: what ends the study is told once."""
        if self.store is None:
            return True
        try:
            return bool(self.store.add("failed", 1) == 1)
        except RuntimeError:  # the store has gone with the process that kept it
            return self.rank == 0


def join() -> Peers:
    """Join the other ranks, and hide them from the libraries below.

    On GPUs a process sees one device, its own: call this before CUDA is initialized.
    """
    if not all(name in os.environ for name in _MEETING) or os.environ["WORLD_SIZE"] == "1":
        hide(os.environ)
        return Peers()
    # mypy: both are public, and imported there without saying so.
    store, rank, world = next(dist.rendezvous("env://"))  # type: ignore[attr-defined]
    # Where torchrun starts the ranks anew, the store still has what the last ones wrote.
    prefix = f"nvamp/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    store = dist.PrefixStore(prefix, store)  # type: ignore[attr-defined]
    hide(os.environ)
    signal.signal(signal.SIGINT, _interrupt)
    signal.signal(signal.SIGTERM, _interrupt)
    return Peers(rank, world, store)


def hide(environ: MutableMapping[str, str]) -> None:
    """Make the environment that of a process on its own, with one GPU to see: the one of its local rank.

    Of a process without a rank it is the first: of several the `Trainer` would make larger batches.
    """
    local = int(environ.get("LOCAL_RANK", "0"))
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    devices = str(local) if visible is None else ",".join(visible.split(",")[local : local + 1])
    environ["CUDA_VISIBLE_DEVICES"] = devices
    for name in _VARIABLES:
        environ.pop(name, None)


def _interrupt(signum: int, frame: FrameType | None) -> None:
    """`torchrun` ends its ranks by either signal, and may send more while they clear up: one is enough."""
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)
    raise KeyboardInterrupt
