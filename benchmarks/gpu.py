"""Correctness, speed and memory of the losses on a GPU, beside their peers: `python -m benchmarks.gpu`.

What is timed is forward and backward, by the device's own clock. The contenders of a table take turns in one
process; figures are medians. What the card can do at best is measured in the same run. The peers are those
that are installed: liger-kernel, cut-cross-entropy, quack-kernels. One that does not run is listed with the
reason. The exit status is 1 where a check of correctness fails or a section breaks off; bars of speed and
memory are reported, met or missed.
"""

import argparse
import gc
import json
import math
import statistics
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import partial
from importlib import import_module
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
import torch.nn.functional as F
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from benchmarks import measure
from benchmarks.cpu import PLAIN, Bar, MiB, Section, console, cost_of_nvamp, train
from benchmarks.measure import Run, Timing
from benchmarks.original import original_nvamp
from nvamp import LinearNVAMPLoss, NVAMPLoss
from nvamp.cross_entropy import linear_nll_sum_max
from nvamp.cross_entropy.options import Options
from nvamp.cross_entropy.parts import token_nll as part_nll
from nvamp.functional import linear_token_nll, token_nll
from nvamp.objective import ALONE

Loss = Callable[[], Tensor]
Make = Callable[[], Loss]  # may raise, where a peer is not installed
Shape = tuple[int, int, int]  # N, D, V

SHAPES: dict[str, Shape] = {
    "x".join(map(str, shape)): shape
    for shape in (
        (8192, 4096, 128256),
        (16384, 2048, 151936),
        (4096, 8192, 262144),
        (32768, 576, 49152),
        (16384, 768, 50257),  # rows at odd addresses
    )
}
CHECKED: list[Shape] = [(333, 96, 1003), (3001, 192, 50257)]  # the second in several chunks
LARGE = (16411, 131101)  # N, V: more than 2³¹ logits
COPIED, SQUARE = 4 * 2**30, 8192  # bytes of the copy and sides of the product that show what the card can do
LIGER = "liger_kernel.transformers"
PACKAGES = ("triton", "liger-kernel", "cut-cross-entropy", "quack-kernels")
FLOOR, THREE, FOUR = "floor: copy of 6·N·V bytes", "three bare products", "four bare products"
FILTERED = "CCE, filtering"  # as Cut Cross-Entropy does by default: it leaves out small gradients
NO_PEERS = (FLOOR, THREE, FOUR, FILTERED)


# Clock and memory --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Meter:
    """Clock and memory of a CUDA device; of a CPU, for the tests, the host's clock and no memory."""

    device: torch.device
    rounds: int
    repeats: int

    def time_in_turn(self, runs: Mapping[str, Run]) -> dict[str, Timing]:
        """Times every contender, in turns, so that drift falls on all alike."""
        if self.device.type == "cpu":
            return measure.time_in_turn(runs, self.repeats)
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(self.rounds):
            for name, run in runs.items():
                seconds[name] += self._seconds(run)
        return {name: Timing(statistics.median(s), min(s), max(s), len(s)) for name, s in seconds.items()}

    def _seconds(self, run: Run) -> list[float]:
        """Of runs in a row, queued behind one that does not count: the device waits for no launch."""
        run()
        events = []
        for _ in range(self.repeats):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record()
            run()
            end.record()
            events.append((start, end))
        torch.cuda.synchronize(self.device)
        return [start.elapsed_time(end) / 1000 for start, end in events]

    def peak_bytes(self, run: Run) -> int:
        """The most bytes that PyTorch held for `run` beyond what it held before."""
        if self.device.type == "cpu":
            run()
            return 0
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        held = torch.cuda.memory_allocated(self.device)
        run()
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) - held

    def free(self) -> None:
        torch.compiler.reset()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def ceilings(meter: Meter, copied: int, square: int) -> dict[str, float]:
    """Bytes read and written, and operations of a bfloat16 product, per second."""
    source = torch.randn(copied // 2, device=meter.device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    a, b = torch.randn(2, square, square, device=meter.device, dtype=torch.bfloat16)
    t = meter.time_in_turn({"copy": lambda: target.copy_(source), "product": lambda: a @ b})
    bytes_per_s, flops_per_s = 2 * source.nbytes / t["copy"].median_s, 2 * square**3 / t["product"].median_s
    return {"copy_bytes_per_s": bytes_per_s, "product_flops_per_s": flops_per_s}


# Contenders --------------------------------------------------------------------------------------------


@dataclass
class Part(Section):
    """A section some of which may not have run."""

    not_run: dict[str, str] = field(default_factory=dict)  # and why
    must_pass: bool = False  # its bars are no goals but conditions, and all of it has to run

    @property
    def failed(self) -> bool:
        if not self.must_pass:
            return any(name.startswith("nvamp: ") for name in self.not_run)
        return bool(self.not_run) or not all(bar.met for bar in self.bars)

    def show(self) -> None:
        table = Table(title=self.title, caption=f"ratio: over {self.baseline}", title_justify="left")
        table.add_column("contender")
        for column in ("ratio", "median ms", "spread", "extra MiB"):
            table.add_column(column, justify="right")
        for name, t in self.timings.items():
            ms = [f"{seconds * 1e3:.3f}" for seconds in (t.median_s, t.smallest_s, t.largest_s)]
            extra = f"{self.extra_bytes[name] / MiB:.0f}" if name in self.extra_bytes else ""
            table.add_row(name, f"{self.ratio(name):.3f}", ms[0], f"{ms[1]}–{ms[2]}", extra)
        console.print(table if table.rows else self.title)
        for name, why in self.not_run.items():
            console.print(f"  [red]not run[/]  {name}: {escape(why)}")
        missed = [bar for bar in self.bars if not bar.met]
        for bar in missed if self.must_pass else self.bars:
            verdict = "[green]met[/]" if bar.met else "[red]missed[/]"
            console.print(f"  {verdict}  {bar.what}: {bar.measured:.3f}, at most {bar.limit:.3f}")
        console.print(f"  {len(self.bars) - len(missed)} of {len(self.bars)} met\n")

    def as_json(self) -> dict[str, Any]:
        record = {**super().as_json(), "not_run": self.not_run, "failed": self.failed}
        for bar in record["bars"]:
            bar["measured"] = bar["measured"] if math.isfinite(bar["measured"]) else None  # JSON has no NaN
        return record

    def add_bars(self, *limits: tuple[str, str, float]) -> None:
        """For a contender over another; and for ours over the fastest of the exact peers, and over itself."""
        peers = [name for name in self.timings if name not in NO_PEERS and not name.startswith("nvamp: ")]
        peer = min(peers, key=lambda name: self.timings[name].median_s, default="")
        for name, to, limit in (*limits, ("nvamp: scalar", peer, 1.0)):
            if {name, to} <= self.timings.keys():
                what = f"{name}, over {to}{', the fastest peer' if to == peer else ''}"
                self.bars.append(Bar(what, self.ratio(name, to=to), limit))
        if {"nvamp: scalar", "nvamp: cross-entropy"} <= self.timings.keys():
            self.bars.append(cost_of_nvamp(self))


def compete(meter: Meter, title: str, baseline: str, makers: Mapping[str, Callable[[], Run]]) -> Part:
    """Makes the contenders and runs each twice, which compiles it and shows its memory; then times them."""
    section, runs = Part(title, baseline, {}), {}
    for name, make in makers.items():
        try:
            run = make()
            run()
            section.extra_bytes[name] = meter.peak_bytes(run)
        except Exception as error:  # of any kind: it is somebody else's code
            section.not_run[name] = reason(error)
        else:
            runs[name] = run
    section.timings = meter.time_in_turn(runs)
    return section


def reason(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def trained(make: Make, *leaves: Tensor) -> Run:
    return train(make(), *leaves)


def of(module: str, name: str) -> Any:
    """A function or class of a peer that may not be installed."""
    return getattr(import_module(module), name)


class Produced(torch.autograd.Function):
    """Its argument, as if a layer had produced it: ours overwrites no leaves."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def logits_path(meter: Meter, n: int, vocab: int, copy_bytes_per_s: float, peers: bool = True) -> Part:
    x = torch.randn(n, vocab, device=meter.device, dtype=torch.bfloat16, requires_grad=True)
    y = torch.randint(vocab, (n,), device=meter.device)
    # For those that write the gradient over the logits: from the second run on they find the gradient there,
    # numbers like others.
    used = x.detach().clone().requires_grad_()

    def eager() -> Tensor:
        return F.cross_entropy(x.float(), y)

    def ours(**options: Any) -> Loss:
        criterion = NVAMPLoss(shift=False, **options)
        return lambda: criterion(Produced.apply(used) if criterion.inplace_backward else x, y)  # type: ignore[no-untyped-call]

    others: dict[str, Make] = {
        "compiled cross-entropy": lambda: torch.compile(eager),
        "Liger, in place": lambda: partial(of(LIGER, "LigerCrossEntropyLoss")(), used, y),
        "quack": lambda: partial(of("quack", "cross_entropy"), x, y),
    }
    losses: dict[str, Make] = {
        "eager cross-entropy": lambda: eager,
        "original NVAMP": lambda: lambda: original_nvamp(x[None], y[None]),
        **(others if peers else {}),
        "nvamp: cross-entropy": partial(ours, **PLAIN),
        "nvamp: scalar": ours,
        "nvamp: token": partial(ours, gradient="token"),
        "nvamp: scalar, in place": partial(ours, inplace_backward=True),
    }
    makers = {name: partial(trained, make, x, used) for name, make in losses.items()}
    section = compete(meter, f"logits path, {n} × {vocab}, bfloat16", FLOOR, makers)
    floor = 6 * n * vocab / copy_bytes_per_s  # logits read twice, gradient written once
    section.timings = {FLOOR: Timing(floor, floor, floor, 0), **section.timings}
    section.add_bars(("nvamp: scalar", FLOOR, 1 / 0.85))
    return section


def linear_path(meter: Meter, n: int, d: int, vocab: int, peers: bool = True) -> Part:
    h, w, _ = batch(meter.device, (n, d, vocab))
    y = torch.randint(vocab, (n,), device=meter.device)
    grad = torch.randn(n, vocab, device=meter.device, dtype=torch.bfloat16)

    def products(of_logits: int) -> None:
        hidden, weight = h.detach(), w.detach()
        for _ in range(of_logits):
            _ = hidden @ weight.T
        _ = grad @ weight
        _ = grad.T @ hidden

    def ours(**options: Any) -> Loss:
        criterion = LinearNVAMPLoss(shift=False, **options)
        return lambda: criterion(h, w, y)

    losses: dict[str, Make] = {
        "eager linear, cross-entropy": lambda: lambda: F.cross_entropy((h @ w.T).float(), y),
        "original NVAMP": lambda: lambda: original_nvamp((h @ w.T)[None], y[None]),
        **(linear_peers(h, w, y) if peers else {}),
        "nvamp: cross-entropy": partial(ours, **PLAIN),
        "nvamp: scalar": ours,
        "nvamp: scalar, bfloat16 sum": partial(ours, accum_dtype=torch.bfloat16),
        "nvamp: token": partial(ours, gradient="token"),
    }
    makers: dict[str, Callable[[], Run]] = {
        THREE: lambda: partial(products, 1),
        FOUR: lambda: partial(products, 2),
        **{name: partial(trained, make, h, w) for name, make in losses.items()},
    }
    section = compete(meter, f"linear path, {n} × {d} × {vocab}, bfloat16", THREE, makers)
    add_linear_bars(section)
    return section


def linear_peers(h: Tensor, w: Tensor, y: Tensor) -> dict[str, Make]:
    def liger(**options: Any) -> Loss:
        return partial(of(LIGER, "LigerFusedLinearCrossEntropyLoss")(**options), w, h, y)

    def on_inputs(module: str, name: str, **options: Any) -> Loss:
        return partial(of(module, name), h, w, y, **options)

    cut = partial(on_inputs, "cut_cross_entropy", "linear_cross_entropy")
    quack = partial(on_inputs, "quack.linear_cross_entropy", "chunked_linear_cross_entropy")
    return {
        "F.linear_cross_entropy": partial(on_inputs, "torch.nn.functional", "linear_cross_entropy"),
        "Liger, bfloat16 sum": liger,
        "Liger, float32 sum": partial(liger, accum_dtype=torch.float32),
        FILTERED: cut,
        "CCE, filter_eps=None": partial(cut, filter_eps=None),
        "CCE, cce_exact": partial(cut, impl="cce_exact"),
        "CCE, torch_compile": partial(cut, impl="torch_compile"),
        "quack": partial(quack, tuned=False),  # to tune its products takes minutes
    }


def add_linear_bars(section: Part) -> None:
    section.add_bars(("nvamp: scalar", THREE, 1.20), ("nvamp: token", FOUR, 1.25))
    memory = section.extra_bytes
    for ours, liger in (
        ("nvamp: scalar", "Liger, float32 sum"),
        ("nvamp: scalar, bfloat16 sum", "Liger, bfloat16 sum"),
    ):
        if memory.get(liger) and ours in memory:
            section.bars.append(Bar(f"memory of {ours}, over {liger}", memory[ours] / memory[liger], 1.0))


# Correctness -------------------------------------------------------------------------------------------

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OPTIONS = {"label_smoothing": 0.1, "z_loss": 1e-4, "softcap": 3.0, "logit_scale": 0.7}  # a cap that bends
# Of a sum of losses. Several: how the gradient of a label rounds is luck, and the same luck for all labels.
SCALES = (1.1, 1.37, 1.7)
ROUNDING = torch.finfo(torch.bfloat16).eps  # two orders of the same bfloat16 arithmetic differ by less

Results = dict[str, Tensor]
Losses = Callable[..., tuple[Tensor, Tensor]]  # of each token, and their differentiable sum


def correctness(device: torch.device, shapes: list[Shape], large: tuple[int, int]) -> Part:
    cuda, last = device.type == "cuda", shapes[-1]
    checks: dict[str, Callable[[], Iterator[Bar]]] = {
        "inplace_backward": partial(in_place, device, last),
        "many logits": partial(many_logits, device, *large),
        "torch.compile": partial(compiled, device, last, "inductor" if cuda else "aot_eager"),
    }
    if cuda:
        for backend in ("triton", "chunked"):
            checks[f"CUDA graph, {backend}"] = partial(captured, device, last, backend)
            checks[f"no waiting, {backend}"] = partial(unwaiting, device, last, backend)
    plain: list[tuple[Shape, dict[str, Any]]] = [(shape, {}) for shape in shapes]
    variants = [*plain, (shapes[0], OPTIONS), (shapes[0], {"masked": True})]
    for dtype in DTYPES:
        for backend in ("triton", "chunked") if cuda else ("chunked",):
            for shape, options in variants:
                name = " ".join(map(str, (dtype, backend, shape, *options)))
                checks[name] = partial(accuracy, name, device, dtype, shape, backend, **options)
    section = Part("correctness", "", {}, must_pass=True)
    for name, check in checks.items():
        try:
            section.bars += check()
        except Exception as error:
            section.not_run[name] = reason(error)
    return section


def batch(device: torch.device, shape: Shape, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, ...]:
    """Hidden states and weight, whose logits have a deviation of 1, and labels, a tenth of them ignored."""
    n, d, vocab = shape
    h = torch.randn(n, d, device=device, dtype=dtype)
    w = torch.randn(vocab, d, device=device, dtype=dtype) / d**0.5
    y = torch.randint(vocab, (n,), device=device)
    return h.requires_grad_(), w.requires_grad_(), y.masked_fill_(torch.rand(n, device=device) < 0.1, -100)


def definition(
    *inputs: Tensor,
    y: Tensor,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The losses of logits, or of hidden states and weight, by plain PyTorch: float64 of float64 inputs."""
    x = inputs[0] if len(inputs) == 1 else inputs[0] @ inputs[1].T
    z = logit_scale * (x if x.dtype == torch.float64 else x.float())
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    nll = F.cross_entropy(z, y, reduction="none", label_smoothing=label_smoothing)
    return summed(nll + torch.where(y == -100, 0, z_loss * z.logsumexp(-1).square()))


def solve(losses: Losses, inputs: Results, rows: Tensor | slice = slice(None)) -> Results:
    """Losses, and the gradients by each input of some multiples of their sum; of some rows."""
    found = []
    for scale in SCALES:
        leaves = [x.detach().requires_grad_() for x in inputs.values()]
        nll, total = losses(*leaves)
        found.append([g[rows] for g in torch.autograd.grad(scale * total, leaves)])
    gradients = zip(inputs, map(torch.stack, zip(*found, strict=True)), strict=True)
    return {"losses": nll.detach()[rows]} | {f"gradient by {name}": g for name, g in gradients}


def summed(nll: Tensor) -> tuple[Tensor, Tensor]:
    return nll, nll.sum()


def relative_error(x: Tensor, truth: Tensor) -> float:
    return float((x.double() - truth.double()).norm() / truth.double().norm())


def against_eager(what: str, ours: Results, plain: Losses, inputs: Results) -> Iterator[Bar]:
    """Errors against float64 over those of plain PyTorch in the dtype of the inputs."""
    truth, eager = solve(plain, {name: x.double() for name, x in inputs.items()}), solve(plain, inputs)
    for name, t in truth.items():
        ratio = relative_error(ours[name], t) / relative_error(eager[name], t)
        yield Bar(f"{what}, {name}: error over eager's", ratio, 1.1)


def accuracy(
    what: str,
    device: torch.device,
    dtype: torch.dtype,
    shape: Shape,
    backend: str,
    masked: bool = False,
    **options: Any,
) -> Iterator[Bar]:
    """Of all paths; `masked`, with half of the logits −inf in that from logits."""
    n, _, vocab = shape
    labelled = vocab // 2 if masked else vocab
    h, w, y = batch(device, shape, dtype)
    y = torch.where(y == -100, y, y % labelled)
    x = 3 * torch.randn(n, vocab, device=device, dtype=dtype)
    x[:, labelled:] = -torch.inf

    def one_pass(h: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        total, _, nll = linear_nll_sum_max(h, w, y, backend=backend, **options)
        return nll, total

    paths: dict[str, tuple[Losses, Results]] = {
        "logits": (lambda x: summed(token_nll(x, y, backend=backend, **options)), {"logits": x}),
        "logits, as a part of a vocabulary that is all of it": (
            lambda x: summed(part_nll(x, y, False, backend, Options(**options), ALONE)),
            {"logits": x},
        ),
        "linear, recompute": (
            lambda h, w: summed(linear_token_nll(h, w, y, backend=backend, **options)),
            {"hidden": h, "weight": w},
        ),
        "linear, one pass": (one_pass, {"hidden": h, "weight": w}),
    }
    if dtype == torch.float16:  # no loss takes it there
        del paths["linear, one pass"]
    for path, (losses, inputs) in paths.items():
        plain = partial(definition, y=y, **options)
        yield from against_eager(f"{what}, {path}", solve(losses, inputs), plain, inputs)


def many_logits(device: torch.device, n: int, vocab: int) -> Iterator[Bar]:
    """Some rows of many; the others only have to be there."""
    x = torch.randn(n, vocab, device=device, dtype=torch.bfloat16)
    y = torch.randint(vocab, (n,), device=device)
    rows = torch.tensor([0, 1, n // 2, n - 2, n - 1], device=device)
    ours = solve(lambda x: summed(token_nll(x, y)), {"logits": x}, rows)
    plain = partial(definition, y=y[rows])
    yield from against_eager(f"{n} × {vocab} logits", ours, plain, {"logits": x[rows]})


def in_place(device: torch.device, shape: Shape) -> Iterator[Bar]:
    h, w, y = batch(device, shape)
    x = (h @ w.T).detach().requires_grad_()
    used = x * 1
    (expected,) = torch.autograd.grad(NVAMPLoss(shift=False)(x, y), x)
    (grad,) = torch.autograd.grad(NVAMPLoss(shift=False, inplace_backward=True)(used, y), x)
    yield Bar("inplace_backward: elements that differ", float((grad != expected).sum()), 0)
    yield Bar("inplace_backward: logits not overwritten", float((used.detach() != expected).sum()), 0)


def step(criterion: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    """A loss, and its gradient by all inputs but the labels."""
    loss = criterion(*inputs)
    return [loss.detach(), *torch.autograd.grad(loss, inputs[:-1])]


def alike(what: str, results: list[Tensor], expected: list[Tensor]) -> Iterator[Bar]:
    for i, (x, truth) in enumerate(zip(results, expected, strict=True)):
        yield Bar(f"{what}, result {i}: difference from eager execution", relative_error(x, truth), ROUNDING)


def compiled(device: torch.device, shape: Shape, compiler: str) -> Iterator[Bar]:
    """One compilation serves any number of tokens; a second one would raise."""
    torch.compiler.reset()  # what was compiled before does not count
    losses = (NVAMPLoss(shift=False), LinearNVAMPLoss(shift=False))
    fast = [torch.compile(loss, fullgraph=True, backend=compiler) for loss in losses]
    with torch._dynamo.config.patch(error_on_recompile=True):
        for n in (shape[0], 37, 512):
            h, w, y = batch(device, (n, *shape[1:]))
            x = (h @ w.T).detach().requires_grad_()
            for t in (x, h, y):
                torch._dynamo.mark_dynamic(t, 0)
            for name, i, inputs in (("logits", 0, (x, y)), ("linear", 1, (h, w, y))):
                what = f"torch.compile, {name}, {n} tokens"
                yield from alike(what, step(fast[i], *inputs), step(losses[i], *inputs))


def losses_on(
    device: torch.device, shape: Shape, backend: str
) -> dict[str, tuple[Callable[..., Tensor], list[Tensor]]]:
    """From logits, in one pass, and recomputing: each with its inputs."""
    h, w, y = batch(device, shape)
    x = (h @ w.T).detach().requires_grad_()
    options: dict[str, Any] = {"shift": False, "backend": backend}
    return {
        "logits": (NVAMPLoss(**options), [x, y]),
        "one pass": (LinearNVAMPLoss(**options), [h, w, y]),
        "recompute": (LinearNVAMPLoss(gradient="token", **options), [h, w, y]),
    }


def captured(device: torch.device, shape: Shape, backend: str) -> Iterator[Bar]:
    """A CUDA graph, captured on one batch, computes another."""
    others = losses_on(device, shape, backend)
    for path, (loss, inputs) in losses_on(device, shape, backend).items():
        side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):  # as PyTorch asks for before a capture
            step(loss, *inputs)
        torch.cuda.current_stream(device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = step(loss, *inputs)
        with torch.no_grad():
            for x, other in zip(inputs, others[path][1], strict=True):
                x.copy_(other)
        graph.replay()
        yield from alike(f"CUDA graph, {path}, {backend}", results, step(loss, *inputs))


def unwaiting(device: torch.device, shape: Shape, backend: str) -> Iterator[Bar]:
    """Recomputing waits, once a direction, for the number of rows that have a label."""
    losses = losses_on(device, shape, backend)
    for path in ("logits", "one pass"):
        loss, inputs = losses[path]
        step(loss, *inputs)
        torch.cuda.set_sync_debug_mode("error")
        try:
            step(loss, *inputs)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        yield Bar(f"{path}, {backend}: waits for the device", 0, 0)


# All of it ---------------------------------------------------------------------------------------------


def parts(
    meter: Meter, shapes: list[Shape], only: list[str], peers: bool, copy_bytes_per_s: float
) -> Iterator[tuple[str, Callable[[], Part]]]:
    if "correctness" in only:
        yield "correctness", partial(correctness, meter.device, CHECKED, LARGE)
    for n, d, vocab in shapes:
        if "logits" in only:
            yield "logits path", partial(logits_path, meter, n, vocab, copy_bytes_per_s, peers)
        if "linear" in only:
            yield "linear path", partial(linear_path, meter, n, d, vocab, peers)


def run(meter: Meter, shapes: list[Shape], only: list[str], peers: bool, out: Path) -> int:
    """Runs the parts and writes the record after each: whatever ends the next one, this much is there."""
    torch.manual_seed(0)
    host, best = machine(meter.device), ceilings(meter, COPIED, SQUARE)
    console.print(", ".join(f"{name} {value}" for name, value in host.items()), markup=False)
    console.print(", ".join(f"{name} {value:.3g}" for name, value in best.items()), "\n")
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    record: dict[str, Any] = {"machine": host, "date": date, "ceilings": best, "sections": []}
    out.mkdir(parents=True, exist_ok=True)
    for title, build in parts(meter, shapes, only, peers, best["copy_bytes_per_s"]):
        meter.free()
        try:
            part = build()
        except Exception as error:
            part = Part(title, "", {}, not_run={title: reason(error)}, must_pass=True)
        part.show()
        record["sections"].append(part.as_json())
        (out / "gpu.json").write_text(json.dumps(record, indent=1))
    console.print(f"wrote {out / 'gpu.json'}")
    return int(any(section["failed"] for section in record["sections"]))


def machine(device: torch.device) -> dict[str, Any]:
    installed = {d.name.lower().replace("_", "-"): d.version for d in distributions() if d.name}
    versions = {name: installed[name] for name in PACKAGES if name in installed}
    if device.type == "cuda":
        versions |= {"card": torch.cuda.get_device_name(device), "cuda": str(torch.version.cuda)}
    return {**measure.machine(), **versions}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder for gpu.json")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contender")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs in a turn")
    parser.add_argument("--shapes", choices=SHAPES, nargs="+", default=list(SHAPES), help="N x D x V")
    known = ["correctness", "logits", "linear"]
    parser.add_argument("--only", choices=known, nargs="+", default=known, help="what to run")
    parser.add_argument("--skip-peers", action="store_true", help="eager PyTorch as the only peer")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks.gpu needs a CUDA device", file=sys.stderr)
        return 2
    for category in (UserWarning, FutureWarning, DeprecationWarning):
        warnings.filterwarnings("ignore", category=category)  # of compilers and peers, each time
    meter = Meter(torch.device("cuda"), args.rounds, args.repeats)
    return run(meter, [SHAPES[name] for name in args.shapes], args.only, not args.skip_peers, args.out)


if __name__ == "__main__":
    sys.exit(main())
