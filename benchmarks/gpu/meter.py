"""Clock and memory of a GPU; for the dry run, a CPU has the host's clock and no memory."""

import gc
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import torch

from benchmarks.gpu.rows import reason

Run = Callable[[], object]
COPIED, SQUARE = 4 * 2**30, 8192  # bytes of the copy and sides of the product that show what the card can do


@dataclass
class Sample:
    """The times of a contender in all rounds so far, in milliseconds."""

    loop: list[float] = field(default_factory=list)  # steps of a plain loop, by the device's events
    graph: list[float] = field(default_factory=list)  # replays of a CUDA graph: the device's time alone
    host: list[float] = field(default_factory=list)  # to enqueue a step
    no_graph: str | None = None  # the reason if there is none

    def __iadd__(self, other: "Sample") -> "Sample":
        self.loop += other.loop
        self.graph += other.graph
        self.host += other.host
        self.no_graph = self.no_graph or other.no_graph
        return self

    def as_row(self) -> dict[str, Any]:
        judged = self.graph or self.loop
        return {
            "ms": statistics.median(self.loop),
            "graph_ms": statistics.median(self.graph) if self.graph else None,
            "host_ms": min(self.host),  # the minimum, since a full queue delays the host
            "smallest_ms": min(judged),
            "largest_ms": max(judged),
            "runs": len(judged),
            **({"no_graph": self.no_graph} if self.no_graph and not self.graph else {}),
        }


class OutOfTimeError(Exception):
    pass


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """A context that raises `OutOfTimeError` after `seconds`, as soon as Python runs a line of its own."""

    def ring(*_: object) -> None:
        raise OutOfTimeError(f"took more than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@dataclass(frozen=True)
class Meter:
    device: torch.device
    seconds: float = 0.2  # approximate length of one measurement
    most: int = 20  # maximum steps of a measurement

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def sync(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def free(self) -> None:
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()

    def measure(self, step: Run, graph: bool = True, may_wait: bool = True) -> Sample:
        """Times a step that has run before. One that `may_wait` for the device is captured unless it does."""
        if not self.on_gpu:
            ms = [self._once(step)]
            return Sample(ms, [], ms, "a CPU has no CUDA graphs")
        steps = self._steps(step)
        sample = Sample(*self._loop(step, steps))
        if not graph:
            return sample
        try:
            if may_wait:
                self._must_not_wait(step)
            sample.graph = self._replays(step, steps)
        except OutOfTimeError:
            raise
        except Exception as error:
            sample.no_graph = reason(error)
        return sample

    def _once(self, step: Run) -> float:
        self.sync()
        start = time.perf_counter()
        step()
        self.sync()
        return (time.perf_counter() - start) * 1e3

    def _steps(self, step: Run) -> int:
        """The number of steps that fit in the time of a measurement, at least 3."""
        return max(3, min(self.most, int(self.seconds * 1e3 / max(self._once(step), 1e-3))))

    def _loop(self, step: Run, steps: int) -> tuple[list[float], list[float], list[float]]:
        """The device's time from step to step, no graph times, and the host's time of the first few steps."""
        marks, host = [self._mark()], []
        for _ in range(steps + 1):
            start = time.perf_counter()
            step()
            host.append((time.perf_counter() - start) * 1e3)
            marks.append(self._mark())
        self.sync()
        times = [a.elapsed_time(b) for a, b in pairwise(marks[1:])]
        return times, [], host[1:5]  # the first step finds an idle device

    def _mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def _must_not_wait(self, step: Run) -> None:
        """Raises if the step waits for the device: its capture would fail and could break the allocator."""
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def _replays(self, step: Run, steps: int) -> list[float]:
        """Times replays, and frees the graph and its memory pool: another contender needs the room."""
        side = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):  # as PyTorch asks for before a capture
            step()
        torch.cuda.current_stream(self.device).wait_stream(side)
        self.sync()
        self.free()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=side):
                step()
            return self._loop(graph.replay, steps)[0]
        finally:
            with suppress(Exception):
                graph.reset()
            del graph
            self.free()

    def peak_bytes(self, step: Run) -> int:
        """The most bytes that PyTorch held for a step beyond what it held before."""
        if not self.on_gpu:
            step()
            return 0
        self.sync()
        torch.cuda.reset_peak_memory_stats(self.device)
        held = torch.cuda.memory_allocated(self.device)
        step()
        self.sync()
        return torch.cuda.max_memory_allocated(self.device) - held

    def ceilings(self, toy: bool = False) -> dict[str, float]:
        """Bytes read and written, and operations of a bfloat16 product, per second."""
        copied, square = (2**16, 16) if toy else (COPIED, SQUARE)
        source = torch.zeros(copied // 2, device=self.device, dtype=torch.bfloat16)
        target = torch.empty_like(source)
        a, b = torch.randn(2, square, square, device=self.device, dtype=torch.bfloat16)
        out = torch.empty_like(a)
        steps: dict[str, Run] = {
            "copy": partial(target.copy_, source),
            "product": partial(torch.mm, a, b, out=out),
        }
        seconds = {}
        for name, step in steps.items():
            step()
            seconds[name] = self.measure(step, graph=False).as_row()["ms"] / 1e3
        copy, product = 2 * source.nbytes / seconds["copy"], 2 * square**3 / seconds["product"]
        return {"copy_bytes_per_s": copy, "product_flops_per_s": product}
