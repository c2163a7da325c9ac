"""The ranks of `torchrun`: they share the runs of a study, and each trains its own independently.

There is no process group. The ranks communicate through the store that `torchrun` keeps for them: the first
rank says which runs to train, and only one rank reports an error.
"""

import json
import os
import signal
import time
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from types import FrameType
from typing import Any

from nvamp.study import StudyError

POLL = 0.1  # seconds; a blocking call of the store would delay signals

# `torchrun` sets all of these; other launchers and old shells may leave some of them.
_MEETING = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# These would make the libraries below believe that the ranks train one model together.
_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID")


@dataclass(frozen=True)
class Peers:
    """The rank of this process, and the number of processes.

    Attributes:
        store: the `torch.distributed.Store` that they share; `None` for a process on its own.
    """

    rank: int = 0
    world: int = 1
    store: Any = None

    def of_first(self, make: Callable[[], Any]) -> Any:
        """Call `make` on the first rank only, and return its result (JSON) on every rank."""
        if self.store is None:
            return make()
        if self.rank == 0:
            self.store.set("first", json.dumps(make()))
        while not self.store.check(["first"]):
            time.sleep(POLL)
        return json.loads(self.store.get("first"))

    def first_to_fail(self) -> bool:
        """Whether no other rank has called this before; only that rank reports the error."""
        if self.store is None:
            return True
        try:
            return bool(self.store.add("failed", 1) == 1)
        except RuntimeError:  # the process that kept the store has ended
            return self.rank == 0


def join() -> Peers:
    """Join the other ranks, and hide them from the libraries below.

    Afterwards each process sees one GPU, its own: call this before CUDA is initialized.
    """
    if not all(name in os.environ for name in _MEETING) or os.environ["WORLD_SIZE"] == "1":
        hide(os.environ)
        return Peers()
    world = _number(os.environ, "WORLD_SIZE", 1)
    rank = _number(os.environ, "RANK", 0, world - 1)
    port = _number(os.environ, "MASTER_PORT", 1, 65535)
    import torch.distributed as dist  # a process on its own can say what is wrong without PyTorch

    try:
        # mypy: both are public, but not explicitly re-exported.
        store, _, _ = next(dist.rendezvous("env://"))  # type: ignore[attr-defined]
    except (ValueError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise StudyError(f"the ranks do not meet at {os.environ['MASTER_ADDR']}:{port}: {reason}") from error
    # If torchrun restarts the ranks, the store still holds what the previous ones wrote.
    prefix = f"nvamp/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    store = dist.PrefixStore(prefix, store)  # type: ignore[attr-defined]
    hide(os.environ)
    signal.signal(signal.SIGINT, _interrupt)
    signal.signal(signal.SIGTERM, _interrupt)
    return Peers(rank, world, store)


def hide(environ: MutableMapping[str, str]) -> None:
    """Make the environment look like a single process's that sees one GPU, the one of its local rank.

    A process without a rank sees the first GPU: if it saw several, the `Trainer` would enlarge the batches.
    """
    local = _number(environ, "LOCAL_RANK", 0) if "LOCAL_RANK" in environ else 0
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    devices = str(local) if visible is None else ",".join(visible.split(",")[local : local + 1])
    environ["CUDA_VISIBLE_DEVICES"] = devices
    for name in _VARIABLES:
        environ.pop(name, None)


def _number(environ: Mapping[str, str], name: str, least: int, most: int | None = None) -> int:
    """The integer in an environment variable; a `StudyError` if it is none from `least` to `most`."""
    value = environ[name]
    if not value.isdecimal() or int(value) < least or (most is not None and int(value) > most):
        to = "" if most is None else f" to {most}"
        raise StudyError(f"{name}={value} in the environment: expected an integer from {least}{to}")
    return int(value)


def _interrupt(signum: int, frame: FrameType | None) -> None:
    """Interrupt once: `torchrun` ends its ranks with either signal, and may send more while they clean up."""
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)
    raise KeyboardInterrupt
