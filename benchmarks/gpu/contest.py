"""The losses beside their peers: time and memory of forward and backward, from logits and from hidden states.

Every contender is timed twice: in a plain loop (`ms`), which may wait for the host, and as replays of a CUDA
graph (`graph_ms`), the device's time alone. Bars are judged by the latter if both sides have it.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import nvamp
from benchmarks import policies
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.engine import counted
from benchmarks.gpu.meter import Run, Sample, time_limit
from benchmarks.gpu.plan import Shape
from benchmarks.gpu.rows import reason
from benchmarks.original import original_nvamp
from benchmarks.policies import Outputs
from nvamp.functional import linear_token_nll, token_nll
from nvamp.objectives import NVAMP, ClippedPolicy, CrossEntropy, Objective

LossOf = Callable[[], Tensor]
MiB = 2**20
ROUNDS = 3
LIGER = "liger_kernel.transformers"
FLOOR, METRICS, NLL = "floor: copy of 6·N·V bytes", "nvamp: nll with metrics", "nvamp: nll"
THREE, FOUR = "three bare products", "four bare products"
THREE_OF_8 = "three bare products, vocabulary a multiple of 8"
LIGER_FLOAT32, LIGER_IN_PLACE = "Liger, float32 sum", "Liger, in place"


@dataclass
class Contender:
    name: str
    make: Callable[[], Run]  # may raise, for example if a peer is not installed
    peer: bool = False  # computes the same result as exactly, so ours is to be as fast
    seconds: float = 25.0  # its limit for the start and for each round

    @property
    def ours(self) -> bool:
        return self.name.startswith("nvamp: ")


@dataclass
class Contest:
    """Contenders, their figures so far, and the bars that follow from them."""

    bench: Bench
    samples: dict[str, Sample] = field(default_factory=dict)
    extra_bytes: dict[str, int] = field(default_factory=dict)
    steps: dict[str, Run] = field(default_factory=dict)
    expected: dict[str, float] = field(default_factory=dict)  # ms, for floors that are computed, not run

    def run(self, contenders: list[Contender]) -> None:
        """Runs rounds while time allows, so that drift affects all alike. The first makes the contenders."""
        for number in range(1 if self.bench.toy else ROUNDS):
            start = time.monotonic()
            for contender in contenders:
                if number == 0 or contender.name in self.steps:
                    self._turn(contender, number)
            if self.bench.seconds_left < 1.3 * (time.monotonic() - start):
                break

    def _turn(self, contender: Contender, number: int) -> None:
        name, bench = contender.name, self.bench
        seconds = min(contender.seconds, bench.seconds_left - 1)
        if seconds < 1:
            if number == 0:
                bench.rows.not_run(name, "no time left", ours=False)
            return
        bench.meter.free()
        try:
            with time_limit(seconds):
                if number == 0:
                    self._start(contender)
                graph = number == 0 or bool(self.samples[name].graph)
                sample = bench.meter.measure(self.steps[name], graph, may_wait=not contender.ours)
        except Exception as error:  # of any kind, since a peer's code may raise it
            self.steps.pop(name, None)
            what = f"{name}, round {number + 1}" if number else name
            bench.rows.not_run(what, reason(error), contender.ours)
            bench.meter.sync()  # raises after a sticky error, which ends this part
            return
        self.samples.setdefault(name, Sample())
        self.samples[name] += sample
        extra = {"extra_MiB": self.extra_bytes[name] / MiB} if bench.meter.on_gpu else {}
        bench.rows.timing(name, **self.samples[name].as_row(), **extra)

    def _start(self, contender: Contender) -> None:
        """Makes a contender and runs it twice: the first run compiles, the second shows the memory."""
        step = contender.make()
        step()
        self.extra_bytes[contender.name] = self.bench.meter.peak_bytes(step)
        self.steps[contender.name] = step

    def expect(self, name: str, ms: float) -> None:
        """Records a time that follows from the ceilings of the card."""
        self.expected[name] = ms
        self.bench.rows.timing(name, ms=ms, graph_ms=ms, host_ms=None)

    def ms(self, name: str, by: str) -> float | None:
        if name in self.expected:
            return self.expected[name]
        row = self.samples[name].as_row() if name in self.samples else {}
        value: float | None = row.get(by)
        return value

    def clock(self, *names: str) -> str | None:
        """The measure that all of them have; `graph_ms` comes first."""
        return next((by for by in ("graph_ms", "ms") if all(self.ms(n, by) for n in names)), None)

    def bar(self, name: str, to: str, limit: float) -> None:
        """Records the time of `name` over the time of `to`, if both ran."""
        self.bar_over(f"{name}, over {to}", name, [to], limit, lambda ms: ms[to])

    def bar_over(
        self, what: str, name: str, others: list[str], limit: float, of: Callable[[dict[str, float]], float]
    ) -> None:
        """Records the time of `name` over a function of the others' times, all by the same clock."""
        by = self.clock(name, *others)
        if by is not None:
            ms = {n: self.ms(n, by) or 0.0 for n in (name, *others)}
            self.bench.rows.bar(what, ms[name] / of(ms), limit, by)

    def bar_over_fastest(self, name: str, contenders: list[Contender]) -> None:
        peers = [c.name for c in contenders if c.peer and c.name in self.samples]
        times = {peer: self._ratio(name, peer) for peer in peers}
        if times and name in self.samples:
            fastest = max(times, key=lambda peer: times[peer])
            self.bar_over(
                f"{name}, over {fastest}, the fastest exact peer",
                name,
                [fastest],
                1.0,
                lambda ms: ms[fastest],
            )

    def _ratio(self, name: str, to: str) -> float:
        by = self.clock(name, to) or "ms"
        return (self.ms(name, by) or 0.0) / (self.ms(to, by) or 1.0)


def trained(loss: LossOf, *leaves: Tensor) -> Run:
    """A run of forward and backward, which drops the gradients."""
    return lambda: torch.autograd.grad(loss(), leaves)


def of(module: str, name: str) -> Any:
    """A function or class of a peer that may not be installed."""
    return getattr(import_module(module), name)


class Produced(torch.autograd.Function):
    """Returns its argument as if a layer had produced it, because ours overwrites no leaves."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


# From logits -------------------------------------------------------------------------------------------


def logits(bench: Bench) -> None:
    ((n, _, vocab),) = bench.shapes
    best = bench.meter.ceilings(bench.toy)
    bench.rows.add("ceilings", **best)
    contest, contenders = Contest(bench), from_logits(bench, n, vocab)
    contest.expect(FLOOR, 6e3 * n * vocab / best["copy_bytes_per_s"])  # read twice, written once
    contest.run(contenders)
    logits_bars(contest, contenders, vocab)


def from_logits(bench: Bench, n: int, vocab: int) -> list[Contender]:
    x = torch.randn(n, vocab, device=bench.meter.device, dtype=torch.bfloat16, requires_grad=True)
    y = torch.randint(vocab, (n,), device=bench.meter.device)
    # For contenders that write the gradient over the logits. From the second run on they find the gradient
    # there, which serves as well.
    used = x.detach().clone().requires_grad_()

    def eager() -> Tensor:
        return F.cross_entropy(x.float(), y)

    def ours(objective: Objective = NVAMP(), **options: Any) -> Run:  # noqa: B008  # it is immutable
        return trained(partial(nvamp.Loss(objective, shift=False, **options), x, y), x)

    def in_place() -> Run:
        criterion = nvamp.Loss(NVAMP(), shift=False, inplace_backward=True)
        return trained(lambda: criterion(Produced.apply(used), y), used)  # type: ignore[no-untyped-call]

    def nll(**options: Any) -> Run:
        fixed = x.detach()
        return lambda: token_nll(fixed, y, **options)

    contenders = [
        Contender("nvamp: scalar", ours),
        Contender("nvamp: cross-entropy", partial(ours, CrossEntropy())),
        Contender("nvamp: token", partial(ours, NVAMP(gradient="token"))),
        Contender("nvamp: tail=0.05", partial(ours, NVAMP(gamma=0.04, tail=0.05))),
        Contender("nvamp: scalar, in place", in_place),
        Contender(NLL, nll),
        Contender(METRICS, partial(nll, return_metrics=True)),
        Contender("eager cross-entropy", lambda: trained(eager, x), peer=True),
        Contender("original NVAMP", lambda: trained(lambda: original_nvamp(x[None], y[None]), x)),
    ]
    if bench.peers:
        contenders += [
            Contender("compiled cross-entropy", lambda: trained(torch.compile(eager), x), peer=True),
            Contender(
                LIGER_IN_PLACE,
                lambda: trained(partial(of(LIGER, "LigerCrossEntropyLoss")(), used, y), used),
            ),
            Contender(
                "quack",
                lambda: trained(partial(of("quack", "cross_entropy"), x, y, reduction="mean"), x),
                True,
            ),
        ]
    return contenders


def logits_bars(contest: Contest, contenders: list[Contender], vocab: int) -> None:
    contest.bar("nvamp: scalar", FLOOR, 1 / 0.80 if vocab % 2 else 1 / 0.85)
    contest.bar("nvamp: scalar, in place", LIGER_IN_PLACE, 1.5)  # which moves 4·N·V bytes, ours 6·N·V
    contest.bar_over_fastest("nvamp: scalar", contenders)
    contest.bar("nvamp: scalar", "nvamp: cross-entropy", 1.02)
    contest.bar(METRICS, NLL, 1.1)


# From hidden states and weight -------------------------------------------------------------------------


def linear(bench: Bench) -> None:
    (shape,) = bench.shapes
    best = bench.meter.ceilings(bench.toy)
    bench.rows.add("ceilings", **best)
    contest, contenders = Contest(bench), from_hidden(bench, shape)
    contest.run(contenders)
    chunks: list[int] = []
    if "nvamp: scalar" in contest.steps:
        with counted() as chunks:
            contest.steps["nvamp: scalar"]()
    if chunks:
        bench.rows.add("note", what="chunks of nvamp: scalar", chunks=len(chunks), MiB=max(chunks) / MiB)
    linear_bars(contest, contenders, shape, chunks, best["copy_bytes_per_s"])


def inputs(bench: Bench, shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, a weight and labels; the logits have a standard deviation of 1."""
    (n, d, vocab), device = shape, bench.meter.device
    h = torch.randn(n, d, device=device, dtype=torch.bfloat16)
    w = torch.randn(vocab, d, device=device, dtype=torch.bfloat16).div_(d**0.5)
    return h.requires_grad_(), w.requires_grad_(), torch.randint(vocab, (n,), device=device)


def from_hidden(bench: Bench, shape: Shape) -> list[Contender]:
    h, w, y = inputs(bench, shape)

    def ours(objective: Objective = NVAMP(), **options: Any) -> Run:  # noqa: B008  # it is immutable
        return trained(partial(nvamp.LinearLoss(objective, shift=False, **options), h, w, y), h, w)

    def eager() -> Tensor:
        return F.cross_entropy((h @ w.T).float(), y)

    contenders = [
        Contender("nvamp: scalar", ours),
        Contender(THREE, partial(products, h, w, 1)),
        Contender("nvamp: cross-entropy", partial(ours, CrossEntropy())),
        Contender("nvamp: token", partial(ours, NVAMP(gradient="token"))),
        Contender("nvamp: tail=0.05", partial(ours, NVAMP(gamma=0.04, tail=0.05))),
        Contender(FOUR, partial(products, h, w, 2)),
        Contender("nvamp: scalar, bfloat16 sum", partial(ours, accum_dtype=torch.bfloat16)),
    ]
    if len(w) % 8:
        contenders.append(Contender(THREE_OF_8, lambda: products(h, padded(w), 1)))
    contenders += [
        Contender("eager linear, cross-entropy", lambda: trained(eager, h, w), peer=True),
        Contender("original NVAMP", lambda: trained(lambda: original_nvamp((h @ w.T)[None], y[None]), h, w)),
    ]
    return contenders + (linear_peers(h, w, y, eager) if bench.peers else [])


def padded(weight: Tensor) -> Tensor:
    """The weight, padded with zero rows so that the vocabulary is a multiple of 8."""
    return F.pad(weight.detach(), (0, 0, 0, -len(weight) % 8))


def products(h: Tensor, w: Tensor, of_logits: int) -> Run:
    """The products of forward and backward: logits, as often as asked, and the two gradients."""
    hidden, weight = h.detach(), w.detach()
    grad = torch.randn(len(hidden), len(weight), device=h.device, dtype=h.dtype)

    def run() -> None:
        for _ in range(of_logits):
            _ = hidden @ weight.T
        _ = grad @ weight
        _ = grad.T @ hidden

    return run


def linear_peers(h: Tensor, w: Tensor, y: Tensor, eager: LossOf) -> list[Contender]:
    def liger(**options: Any) -> Run:
        return trained(partial(of(LIGER, "LigerFusedLinearCrossEntropyLoss")(**options), w, h, y), h, w)

    def on_inputs(module: str, name: str, **options: Any) -> Run:
        return trained(partial(of(module, name), h, w, y, **options), h, w)

    cut = partial(on_inputs, "cut_cross_entropy", "linear_cross_entropy")
    quack = partial(on_inputs, "quack.linear_cross_entropy", "chunked_linear_cross_entropy")
    in_torch = partial(on_inputs, "torch.nn.functional", "linear_cross_entropy")
    return [
        Contender("compiled linear, cross-entropy", lambda: trained(torch.compile(eager), h, w), peer=True),
        Contender(LIGER_FLOAT32, partial(liger, accum_dtype=torch.float32), peer=True),
        Contender("Liger, bfloat16 sum", liger),
        Contender("F.linear_cross_entropy", in_torch, peer=True),
        Contender("CCE, filter_eps=None", partial(cut, filter_eps=None), peer=True),
        Contender("CCE, filtering", cut),  # leaves out small gradients
        Contender("CCE, cce_exact", partial(cut, impl="cce_exact"), peer=True),
        Contender("quack", partial(quack, tuned=False), peer=True),  # tuning its products takes minutes
    ]


# Log-probabilities and entropies -------------------------------------------------------------------------

READ, READ_BOTH = "nvamp: nll, forward", "nvamp: nll and entropy, forward"
TRAINED, TRAINED_BOTH = "nvamp: nll", "nvamp: nll and entropy"


def policy(bench: Bench) -> None:
    """What reinforcement learning takes from hidden states: a loss and an entropy of each token."""
    (shape,) = bench.shapes
    contest, contenders = Contest(bench), of_policy(bench, shape)
    contest.run(contenders)
    contest.bar(READ_BOTH, READ, 1.1)
    contest.bar(TRAINED_BOTH, TRAINED, 1.1)
    if shape[1] >= 2048:
        contest.bar(TRAINED_BOTH, FOUR, 1.25)
    contest.bar_over_fastest(TRAINED_BOTH, contenders)
    for peer in (c.name for c in contenders if c.name.endswith(", forward") and not c.ours):
        contest.bar(READ_BOTH, peer, 1.0)


def of_policy(bench: Bench, shape: Shape) -> list[Contender]:
    h, w, y = inputs(bench, shape)
    weights = torch.randn(2, len(h), device=h.device)  # an advantage and a bonus for each token

    def nll() -> tuple[Tensor, ...]:
        return (linear_token_nll(h, w, y),)

    def clipped() -> Run:
        criterion = nvamp.LinearLoss(ClippedPolicy(entropy=0.01), shift=False)
        return trained(lambda: criterion(h, w, y, advantage=weights[0]), h, w)

    def train(outputs: Outputs) -> Run:
        return trained(
            lambda: torch.stack([x @ a.to(x.dtype) for x, a in zip(outputs(), weights, strict=False)]).sum(),
            h,
            w,
        )

    def read(outputs: Outputs) -> Run:
        return torch.no_grad()(outputs)

    contenders = [
        Contender(READ, lambda: read(nll)),
        Contender(READ_BOTH, lambda: read(policies.ours(h, w, y))),
        Contender(TRAINED, lambda: train(nll)),
        Contender(TRAINED_BOTH, lambda: train(policies.ours(h, w, y))),
        Contender("nvamp: ClippedPolicy(entropy=0.01)", clipped),
        Contender(FOUR, partial(products, h, w, 2)),
        Contender("eager nll and entropy", lambda: train(policies.eager(h, w, y)), peer=True),
    ]
    if bench.peers:
        for name, of_inputs in {"compiled nll and entropy": policies.compiled, **policies.PEERS}.items():
            make = partial(of_inputs, h, w, y)
            contenders += [
                Contender(f"{name}, forward", lambda make=make: read(make())),  # type: ignore[misc]
                Contender(name, lambda make=make: train(make()), peer=True),  # type: ignore[misc]
            ]
    return contenders


def linear_bars(
    contest: Contest, contenders: list[Contender], shape: Shape, chunks: list[int], copy: float
) -> None:
    n, d, vocab = shape
    bare = [name for name in (THREE, THREE_OF_8) if name in contest.samples]
    if chunks and bare:
        moved = 4 * n * vocab + 8 * vocab * d * (len(chunks) - 1)  # logits twice; a float32 sum per chunk
        contest.bar_over(
            f"nvamp: scalar, over three products and the least to move, chunks: {len(chunks)}",
            "nvamp: scalar",
            bare,
            1.1,
            lambda ms: min(ms[name] for name in bare) + moved / copy * 1e3,
        )
    contest.bar_over_fastest("nvamp: scalar", contenders)
    if d >= 2048:
        contest.bar("nvamp: token", FOUR, 1.25)
    contest.bar("nvamp: scalar", "nvamp: cross-entropy", 1.02)
    if chunks and "nvamp: scalar" in contest.extra_bytes:
        # Liger with a float32 sum holds that sum, both gradients, and a chunk.
        allowed = 6 * vocab * d + 2 * n * d + max(chunks)
        what = f"memory of nvamp: scalar, over 6·V·D + 2·N·D bytes and a chunk of {max(chunks) / MiB:.0f} MiB"
        contest.bench.rows.bar(what, contest.extra_bytes["nvamp: scalar"] / allowed, 1.0, "bytes")
