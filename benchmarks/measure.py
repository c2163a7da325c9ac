"""Timing and memory of several contenders in one run."""

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

Run = Callable[[], object]
SLOW = 5.0  # seconds; a run that takes this long is timed once


@dataclass(frozen=True)
class Timing:
    median_s: float
    smallest_s: float
    largest_s: float
    runs: int


@dataclass
class Bar:
    """A ratio that must not be exceeded."""

    what: str
    measured: float
    limit: float

    @property
    def met(self) -> bool:
        return self.measured <= self.limit


def machine() -> dict[str, Any]:
    """The machine on which the numbers were measured."""
    with open("/proc/cpuinfo") as file:
        names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
    tunables = os.environ.get("GLIBC_TUNABLES")  # how memory is allocated
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **({"tunables": tunables} if tunables else {}),
    }


def time_in_turn(contenders: Mapping[str, Run], repeats: int) -> dict[str, Timing]:
    """Times every contender `repeats` times, in turns, so that drift affects all alike.

    A contender runs twice in its turn and the second run counts. So the time is that of a step in a loop,
    without what another contender left behind, such as fragmented memory or memory returned to the system.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, run in contenders.items():
            if not seconds[name] or seconds[name][0] < SLOW:
                run()
                seconds[name].append(_seconds(run))
    return {name: _timing(s) for name, s in seconds.items()}


def time_after_idling(run: Run, repeats: int, idle: float = 2.0) -> Timing:
    """Times a run after `idle` seconds of waiting, `repeats` times."""
    seconds = []
    for _ in range(repeats):
        time.sleep(idle)
        seconds.append(_seconds(run))
    return _timing(seconds)


def _timing(seconds: list[float]) -> Timing:
    return Timing(statistics.median(seconds), min(seconds), max(seconds), len(seconds))


def _seconds(run: Run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def peak_bytes(run: Run) -> int:
    """The most bytes that PyTorch held during `run` beyond what it held before, as its allocator reports.

    They do not include scratch memory of the matrix library.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        result = run()
    del result
    assert record.profiler is not None
    events = record.profiler.kineto_results.events()
    held = peak = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def show_rows(title: str, rows: Sequence[Mapping[str, object]], decimals: int) -> None:
    """Prints rows with the same keys as a table."""
    from rich.console import Console  # only here: `benchmarks.gpu` does without rich
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for name in rows[0]:
        table.add_column(name, justify="right")
    for row in rows:
        cells = (f"{x:.{decimals}f}" if isinstance(x, float) else str(x) for x in row.values())
        table.add_row(*cells)
    Console().print(table)


def as_json(timings: Mapping[str, Timing]) -> dict[str, Any]:
    return {name: asdict(timing) for name, timing in timings.items()}
