"""Speed and memory of the losses on this CPU, beside their peers: `make bench`.

All contenders of a table run in turn in one process, forward and backward. Figures are medians unless marked
otherwise. Ratios carry over to other machines better than seconds do.
"""

import argparse
import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks import policies
from benchmarks.measure import (
    Bar,
    Run,
    Timing,
    as_json,
    machine,
    peak_bytes,
    time_after_idling,
    time_in_turn,
)
from benchmarks.original import original_nvamp
from nvamp import LinearLoss, Loss
from nvamp.engine.hugepages import in_huge_pages
from nvamp.functional import token_nll
from nvamp.objectives import NVAMP, CrossEntropy, Objective

MiB = 2**20
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
OURS: dict[str, Objective] = {
    "cross-entropy": CrossEntropy(),
    "scalar": NVAMP(),
    "token": NVAMP(gradient="token"),
    "tail=0.05": NVAMP(gamma=0.04, tail=0.05),
}
console = Console()


@dataclass
class Section:
    title: str
    baseline: str
    timings: dict[str, Timing]
    extra_bytes: dict[str, int] = field(default_factory=dict)  # what the contender holds at its peak
    bars: list[Bar] = field(default_factory=list)

    def ratio(self, name: str, to: str | None = None) -> float:
        return self.timings[name].median_s / self.timings[to or self.baseline].median_s

    def show(self) -> None:
        table = Table(title=self.title, title_justify="left")
        table.add_column("contender")
        for column in ("ratio", "median s", "spread", "runs", "extra MiB"):
            table.add_column(column, justify="right")
        for name, t in self.timings.items():
            extra = self.extra_bytes.get(name)
            table.add_row(
                name,
                f"{self.ratio(name):.3f}",
                f"{t.median_s:.3g}",
                f"{t.smallest_s:.3g}–{t.largest_s:.3g}",
                str(t.runs),
                "" if extra is None else f"{extra / MiB:.0f}",
            )
        console.print(table)
        for bar in self.bars:
            verdict = "[green]met[/]" if bar.met else "[red]missed[/]"
            console.print(f"  {verdict}  {bar.what}: {bar.measured:.3f}, at most {bar.limit:.3f}")
        console.print()

    def as_json(self) -> dict[str, Any]:
        return {
            "title": self.title,
            "baseline": self.baseline,
            "timings": as_json(self.timings),
            "ratios": {name: self.ratio(name) for name in self.timings},
            "extra_bytes": self.extra_bytes,
            "bars": [{**vars(bar), "met": bar.met} for bar in self.bars],
        }


def train(loss: Callable[[], Tensor], *leaves: Tensor) -> Run:
    """Forward and backward of a loss; the gradients are dropped."""

    def run() -> None:
        torch.autograd.backward(loss())
        for leaf in leaves:
            leaf.grad = None

    return run


def has_compiler() -> bool:
    return any(shutil.which(name) for name in ("g++", "clang++", "c++"))


# Logits path -------------------------------------------------------------------------------------------


def logits_path(dtype: str, repeats: int, n: int = 2048, vocab: int = 32000) -> Section:
    x = torch.randn(1, n, vocab).to(DTYPES[dtype]).requires_grad_()
    y = torch.randint(vocab, (1, n))

    def eager() -> Tensor:
        return F.cross_entropy(x.float()[0], y[0])

    def ours(objective: Objective) -> Callable[[], Tensor]:
        criterion = Loss(objective, shift=False)
        return lambda: criterion(x, y)

    losses = {
        "eager cross-entropy": eager,
        "original NVAMP": lambda: original_nvamp(x, y),
        **{f"nvamp: {name}": ours(objective) for name, objective in OURS.items()},
    }
    if has_compiler():
        losses["compiled cross-entropy"] = torch.compile(eager)
    runs = {name: train(loss, x) for name, loss in losses.items()}
    section = Section(
        f"logits path, {n} × {vocab}, {dtype}", "eager cross-entropy", time_in_turn(runs, repeats)
    )
    section.extra_bytes = {name: peak_bytes(run) for name, run in runs.items()}
    forward = peak_bytes(losses["nvamp: scalar"])
    loss = losses["nvamp: scalar"]()
    backward = peak_bytes(lambda: torch.autograd.backward(loss))
    section.bars = [
        Bar(
            "scalar over eager cross-entropy",
            section.ratio("nvamp: scalar"),
            0.52 if dtype == "float32" else 0.28,
        ),
        cost_of_nvamp(section),
        Bar("memory of the forward over the logits", forward / x.nbytes, 0.1),
        Bar("memory of the backward over the logits", backward / x.nbytes, 1.1),
    ]
    if has_compiler():
        ratio = section.ratio("nvamp: scalar", to="compiled cross-entropy")
        section.bars.append(Bar("scalar over compiled cross-entropy", ratio, 1.0))
    return section


def cost_of_nvamp(section: Section, name: str = "scalar", limit: float = 1.02) -> Bar:
    """Compares the fastest runs of both: they differ so little that medians would show noise instead."""
    ours, plain = (section.timings[f"nvamp: {what}"].smallest_s for what in (name, "cross-entropy"))
    return Bar(f"{name} over the same engine's cross-entropy, fastest runs", ours / plain, limit)


# Linear path -------------------------------------------------------------------------------------------


def linear_path(
    dtype: str, repeats: int, n: int = 2048, d: int = 576, vocab: int = 49152, peers: bool = True
) -> Section:
    h = torch.randn(1, n, d).to(DTYPES[dtype]).requires_grad_()
    w = (torch.randn(vocab, d) / 24).to(DTYPES[dtype]).requires_grad_()
    y = torch.randint(vocab, (1, n))
    hidden, weight, grad = h.detach()[0], w.detach(), torch.randn(n, vocab).to(DTYPES[dtype])

    def three_products() -> None:
        _ = hidden @ weight.T
        _ = grad @ weight
        _ = grad.T @ hidden

    def ours(objective: Objective) -> Callable[[], Tensor]:
        criterion = LinearLoss(objective, shift=False)
        return lambda: criterion(h, w, y)

    losses = {f"nvamp: {name}": ours(objective) for name, objective in OURS.items()}
    if peers:
        losses = {
            "eager linear, cross-entropy": lambda: F.cross_entropy((h @ w.T).float()[0], y[0]),
            "original NVAMP": lambda: original_nvamp(h @ w.T, y),
            **linear_peers(h, w, y),
            **losses,
        }
    runs: dict[str, Run] = {"three bare products": three_products}
    runs |= {name: train(loss, h, w) for name, loss in losses.items()}
    section = Section(
        f"linear path, {n} × {d} × {vocab}, {dtype}", "three bare products", time_in_turn(runs, repeats)
    )
    section.extra_bytes = {name: peak_bytes(run) for name, run in runs.items()}
    gradients = h.nbytes + w.nbytes
    section.bars = [
        Bar(
            "scalar over three bare products",
            section.ratio("nvamp: scalar"),
            1.10 if dtype == "float32" else 1.40,
        ),
        cost_of_nvamp(section),
        cost_of_nvamp(section, "tail=0.05", 1.12),
        Bar("scalar: MiB beyond the gradients", (section.extra_bytes["nvamp: scalar"] - gradients) / MiB, 64),
        Bar("token: MiB beyond the gradients", (section.extra_bytes["nvamp: token"] - gradients) / MiB, 64),
    ]
    return section


def linear_peers(h: Tensor, w: Tensor, y: Tensor) -> dict[str, Callable[[], Tensor]]:
    """The linear cross-entropies of PyTorch and Cut Cross-Entropy, as far as they are installed."""
    peers: dict[str, Callable[[], Tensor]] = {}
    if hasattr(F, "linear_cross_entropy"):
        linear_cross_entropy, options = F.linear_cross_entropy, torch.nn.LinearCrossEntropyOptions()
        peers["F.linear_cross_entropy"] = lambda: linear_cross_entropy(h[0], w, y[0])
        peers["F.linear_cross_entropy, chunked"] = lambda: linear_cross_entropy(
            h[0], w, y[0], options=options
        )
    try:
        from cut_cross_entropy import linear_cross_entropy as cut
    except ImportError:
        return peers
    if has_compiler():
        peers["cut-cross-entropy, torch_compile"] = lambda: cut(h, w, y, impl="torch_compile")
    return peers


# Log-probabilities and entropies -----------------------------------------------------------------------

EAGER_BOTH, OURS_BOTH = "eager nll and entropy", "nvamp: nll and entropy"


def policy(
    dtype: str,
    repeats: int,
    forward: bool = False,
    n: int = 2048,
    d: int = 576,
    vocab: int = 49152,
    peers: bool = True,
) -> Section:
    """What reinforcement learning takes from hidden states: without gradient if `forward`, else trained."""
    h = torch.randn(n, d).to(DTYPES[dtype]).requires_grad_()
    w = (torch.randn(vocab, d) / 24).to(DTYPES[dtype]).requires_grad_()
    y = torch.randint(vocab, (n,))
    advantage, bonus = torch.randn(2, n).unbind()

    def run_of(outputs: policies.Outputs) -> Run:
        def loss() -> Tensor:
            nll, entropy = outputs()
            return advantage @ nll - bonus @ entropy.float()

        return torch.no_grad()(outputs) if forward else train(loss, h, w)

    contenders = {EAGER_BOTH: policies.eager(h, w, y), OURS_BOTH: policies.ours(h, w, y)}
    for name, make in policies.PEERS.items() if peers else ():
        with suppress(ImportError):
            contenders[name] = make(h, w, y)
    if peers and has_compiler():
        contenders["compiled nll and entropy"] = policies.compiled(h, w, y)
    runs = {name: run_of(outputs) for name, outputs in contenders.items()}
    section = Section(
        f"nll and entropy, {'forward' if forward else 'trained'}, {n} × {d} × {vocab}, {dtype}",
        EAGER_BOTH,
        time_in_turn(runs, repeats),
    )
    section.extra_bytes = {name: peak_bytes(run) for name, run in runs.items()}
    for name in (name for name in runs if name != OURS_BOTH):
        section.bars += [
            Bar(f"time over {name}", section.ratio(OURS_BOTH, to=name), 1.0),
            Bar(f"memory over {name}", section.extra_bytes[OURS_BOTH] / section.extra_bytes[name], 1.0),
        ]
    return section


# Few rows ----------------------------------------------------------------------------------------------


def small(repeats: int, rows: tuple[int, ...] = (1, 8, 64), vocab: int = 151936) -> Section:
    """Losses of few rows, with a weight each. They take little time, so there are more runs."""
    runs: dict[str, Run] = {}
    for n in rows:
        runs |= few_rows(n, vocab)
    section = Section(
        f"nll from logits, few rows × {vocab}, float32", f"eager, {rows[0]}", time_in_turn(runs, 5 * repeats)
    )
    section.extra_bytes = {name: peak_bytes(run) for name, run in runs.items()}
    section.bars = [
        Bar(f"rows: {n}, nvamp over eager", section.ratio(f"nvamp, {n}", to=f"eager, {n}"), 1.0) for n in rows
    ]
    return section


def few_rows(n: int, vocab: int) -> dict[str, Run]:
    x, y, weight = torch.randn(n, vocab).requires_grad_(), torch.randint(vocab, (n,)), torch.rand(n)
    return {
        f"eager, {n}": train(lambda: weight @ F.cross_entropy(x, y, reduction="none"), x),
        f"nvamp, {n}": train(lambda: weight @ token_nll(x, y), x),
    }


# Huge pages --------------------------------------------------------------------------------------------


def huge_pages(repeats: int) -> Section:
    size = 2048 * 32000
    runs: dict[str, Run] = {
        "fill fresh memory": lambda: torch.empty(size).fill_(1),
        "fill fresh memory, huge pages": lambda: in_huge_pages(torch.empty(size)).fill_(1),
    }
    used = torch.empty(size)
    runs["fill used memory"] = lambda: used.fill_(1)
    timings = time_in_turn(runs, repeats)
    for name in ("fill fresh memory", "fill fresh memory, huge pages"):
        timings[f"{name}, after 2 s of idleness"] = time_after_idling(runs[name], repeats)
    return Section("250 MiB of float32", "fill fresh memory", timings)


def sections(repeats: int, peers: bool = True) -> Iterator[tuple[str, Callable[[], Section]]]:
    yield "hugepages", lambda: huge_pages(repeats)
    yield "small", lambda: small(repeats)
    for dtype in DTYPES:
        yield f"logits-{dtype}", partial(logits_path, dtype, repeats)
        yield f"linear-{dtype}", partial(linear_path, dtype, repeats, peers=peers)
        yield f"policy-forward-{dtype}", partial(policy, dtype, repeats, forward=True, peers=peers)
        yield f"policy-{dtype}", partial(policy, dtype, repeats, peers=peers)


def main() -> None:
    names = [name for name, _ in sections(0)]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder for cpu.json")
    parser.add_argument("--repeats", type=int, default=9, help="timed runs of each contender")
    parser.add_argument("--only", choices=names, nargs="+", default=names, help="sections to run")
    parser.add_argument("--no-peers", action="store_true", help="from hidden states, time nvamp alone")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", category=UserWarning)  # peers that fall back warn each time
    torch.manual_seed(0)
    host = machine()
    console.print(", ".join(f"{name} {value}" for name, value in host.items()))
    done = []
    for name, run in sections(args.repeats, peers=not args.no_peers):
        if name in args.only:
            torch.compiler.reset()
            done.append(run())
            done[-1].show()
    args.out.mkdir(parents=True, exist_ok=True)
    record = {
        "machine": host,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "sections": [section.as_json() for section in done],
    }
    path = args.out / "cpu.json"
    path.write_text(json.dumps(record, indent=1))
    console.print(f"wrote {path}")


if __name__ == "__main__":
    main()
