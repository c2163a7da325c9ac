"""The basis of the engine's choices: its launches and chunks at other sizes, and bare products.

Rows with the same `case` are several ways to do the same thing; the library's own has `own`.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.contest import MiB, inputs, trained
from benchmarks.gpu.engine import Options, chunks_of, counted, sizes_of, triton
from benchmarks.gpu.meter import Run
from nvamp import LinearLoss, LinearNVAMPLoss, Loss, NVAMPLoss
from nvamp.objectives import NVAMP, CrossEntropy, Objective

Size = tuple[int, int]  # columns that a program takes at a time, and its warps
STREAMING: list[Size] = [(8192, 16), (8192, 8), (4096, 8), (2048, 8), (4096, 16), (2048, 4), (16384, 16)]
REVISITING: list[Size] = [(16384, 32), (8192, 32), (32768, 32), (8192, 16), (4096, 16)]
FEW_ROWS: list[Size] = [(8192, 8), (16384, 16), (16384, 32), (32768, 32)]


def timed(bench: Bench, what: str, step: Run, moved: float = 0, computed: float = 0, **more: Any) -> None:
    """Records times, and the bytes moved and operations done per second if they are known."""

    def write() -> None:
        step()
        row = bench.meter.measure(step, may_wait=False).as_row()
        seconds = (row["graph_ms"] or row["ms"]) / 1e3
        rates = {"TB_per_s": moved / seconds / 1e12} if moved else {}
        rates |= {"TFLOP_per_s": computed / seconds / 1e12} if computed else {}
        bench.rows.timing(what, **row, **rates, **more)

    bench.attempt(what, write)


def inside(context: Callable[[], AbstractContextManager[object]], step: Run) -> Run:
    """The step, each time within a context of the host, which costs the device nothing."""

    def run() -> None:
        with context():
            step()

    return run


# The host ----------------------------------------------------------------------------------------------


def overhead(bench: Bench) -> None:
    """Times everything but the passes over the logits: many tokens with a vocabulary of 16."""
    device = bench.meter.device
    for n in (64,) if bench.toy else (64, 8192, 32768):
        x = torch.randn(n, 16, device=device, dtype=torch.bfloat16, requires_grad=True)
        h = torch.randn(n, 64, device=device, dtype=torch.bfloat16, requires_grad=True)
        w = torch.randn(16, 64, device=device, dtype=torch.bfloat16, requires_grad=True)
        y = torch.randint(16, (n,), device=device)
        objectives: dict[str, Objective] = {
            "scalar": NVAMP(),
            "cross-entropy": CrossEntropy(),
            "token": NVAMP(gradient="token"),
            "tail=0.05": NVAMP(gamma=0.04, tail=0.05),
        }
        for name, objective in objectives.items():
            loss = partial(Loss(objective, shift=False), x, y)
            timed(bench, f"logits, {name}, {n} tokens", trained(loss, x))
        for name, objective in objectives.items():
            loss = partial(LinearLoss(objective, shift=False), h, w, y)
            timed(bench, f"linear, {name}, {n} tokens", trained(loss, h, w))
        eager = partial(F.cross_entropy, x, y)
        timed(bench, f"eager cross-entropy, {n} tokens", trained(eager, x))


def small(bench: Bench) -> None:
    """Times few rows, whose programs leave most of the card idle. The rows stay in the cache between runs."""
    device, vocab = bench.meter.device, 256 if bench.toy else 128256
    for n in (1, 2) if bench.toy else (1, 8, 64, 256):
        x = torch.randn(n, vocab, device=device, dtype=torch.bfloat16, requires_grad=True)
        y, fixed = torch.randint(vocab, (n,), device=device), x.detach()
        nll = partial(triton.token_nll, fixed, y, False, Options())
        case = f"nll, {n} rows"
        timed(bench, f"{case}, as chosen", nll, 2 * n * vocab, case=case, own=True)
        for block, warps in () if bench.toy else FEW_ROWS:
            what, step = (
                f"{case}, {block} columns by {warps} warps",
                inside(partial(sizes_of, block, warps), nll),
            )
            timed(bench, what, step, 2 * n * vocab, case=case, own=False)
        unit = partial(triton.unit_gradient_, fixed.clone(), y, Options())
        timed(bench, f"unit gradient, {n} rows", unit, 4 * n * vocab)
        ours = trained(partial(NVAMPLoss(shift=False), x, y), x)
        timed(bench, f"nvamp: scalar, {n} rows", ours, 6 * n * vocab)
        eager = trained(lambda x=x, y=y: F.cross_entropy(x.float(), y), x)  # type: ignore[misc]
        timed(bench, f"eager cross-entropy, {n} rows", eager)


# Kernels -----------------------------------------------------------------------------------------------


def launches(x: Tensor, y: Tensor, out: Tensor) -> dict[str, tuple[Run, Callable[..., Any], list[Size], int]]:
    """Each kernel's launch, the function that chooses its sizes, sizes to try, and its bytes per logit."""
    _, norm, *_ = triton.token_nll(x, y, False, Options())
    weights = torch.ones(len(x), device=x.device)
    return {
        "nll": (
            lambda: triton.token_nll(x, y, False, Options()),
            partial(triton.reading, rows=len(x)),
            STREAMING,
            2,
        ),
        "nll with metrics": (
            lambda: triton.token_nll(x, y, True, Options()),
            partial(triton.reading, rows=len(x), metrics=True),
            STREAMING,
            2,
        ),
        "gradient": (
            lambda: triton.token_nll_backward(weights, x, y, norm, Options(), out=out),
            triton.streaming,
            STREAMING,
            4,
        ),
        "gradient, in place": (
            lambda: triton.token_nll_backward(weights, x, y, norm, Options(), out=x),
            triton.streaming,
            STREAMING[:3],
            4,
        ),
        "unit gradient": (lambda: triton.unit_gradient_(x, y, Options()), triton.revisiting, REVISITING, 4),
    }


def kernels(bench: Bench) -> None:
    """Times every kernel at several sizes; bytes are counted as if the second read of a row were free."""
    for n, vocab in [(3, 512)] if bench.toy else [(8192, 128256), (4096, 262144), (32768, 49152)]:
        x, y, out = batch(bench, n, vocab, vocab)
        for name, (step, rule, sizes, bytes_) in launches(x, y, out).items():
            case, own = f"{name}, {n} × {vocab}", rule(vocab, x.dtype, False)
            tried = dict.fromkeys([(own.block, own.num_warps), *(sizes[:1] if bench.toy else sizes)])
            for block, warps in tried:
                timed(
                    bench,
                    f"{case}, {block} columns by {warps} warps",
                    inside(partial(sizes_of, block, warps), step),
                    bytes_ * n * vocab,
                    case=case,
                    own=(block, warps) == (own.block, own.num_warps),
                )
        del x, out, step
        bench.meter.free()


def batch(bench: Bench, n: int, vocab: int, pitch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logits whose rows are `pitch` elements apart, labels, and room for a gradient."""
    device = bench.meter.device
    x = torch.randn(n, pitch, device=device, dtype=torch.bfloat16)[:, :vocab]
    return x, torch.randint(vocab, (n,), device=device), x.new_empty(n, vocab)


def odd(bench: Bench) -> None:
    """Times rows at odd addresses and padded rows, and vocabularies that are multiples of 8 only."""
    n, d = (3, 16) if bench.toy else (16384, 768)
    for vocab in (257, 264) if bench.toy else (50257, 50264, 50272):
        for pitch in dict.fromkeys((vocab, -(-vocab // 16) * 16)):
            x, y, out = batch(bench, n, vocab, pitch)
            w, h = x.new_ones(vocab, d), torch.randn(n, d, device=x.device, dtype=x.dtype)
            for name, (step, *_, bytes_) in launches(x, y, out).items():
                timed(bench, f"{name}, vocabulary {vocab} in rows of {pitch}", step, bytes_ * n * vocab)
            steps: dict[str, Run] = {
                "logits": partial(torch.mm, h, w.T, out=x),
                "gradient by hidden": partial(torch.mm, x, w),
                "gradient by weight": partial(torch.mm, x.T, h),
            }
            for name, product in steps.items():
                what = f"product: {name}, vocabulary {vocab} in rows of {pitch}"
                timed(bench, what, product, computed=2 * n * d * vocab)
            del x, out, step, steps, product
            bench.meter.free()


# The linear path ---------------------------------------------------------------------------------------


KINDS: dict[str, dict[str, Any]] = {
    "scalar": {},
    "scalar, bfloat16 sum": {"accum_dtype": torch.bfloat16},
    "token": {"gradient": "token"},
}


def chunks(bench: Bench) -> None:
    """Measures time and memory with chunks of several sizes."""
    for shape in bench.shapes:
        (n, d, vocab), (h, w, y) = shape, inputs(bench, shape)
        for kind, options in KINDS.items():
            step = trained(partial(LinearNVAMPLoss(shift=False, **options), h, w, y), h, w)
            computed = (8 if kind == "token" else 6) * n * d * vocab
            for mib, context in chunk_sizes(n, vocab, few=kind != "scalar"):
                case = f"linear, {kind}, {n} × {d} × {vocab}"
                what, run = f"{case}, chunks {mib}", inside(context, step)

                def measured(run: Run = run) -> dict[str, float]:
                    with counted() as found:
                        run()
                    peak = bench.meter.peak_bytes(run)
                    return {"chunks": len(found), "extra_MiB": peak / MiB}

                more: dict[str, float] = {}
                if bench.attempt(what, lambda: more.update(measured())):  # noqa: B023
                    timed(bench, what, run, computed=computed, case=case, own=mib == "as chosen", **more)
        del h, w, step, run
        bench.meter.free()


def chunk_sizes(
    n: int, vocab: int, few: bool
) -> Iterator[tuple[str, Callable[[], AbstractContextManager[object]]]]:
    yield "as chosen", nullcontext
    for mib in (128, 256, 512) if few else (128, 256, 512, 1024, 2048, 4096):
        rows = max(mib * MiB // (2 * vocab) // 128, 1) * 128
        if rows < 2 * n:
            yield f"of {mib} MiB", partial(chunks_of, rows)


def products(bench: Bench) -> None:
    """Times the products of a chunk, and the cost of a float32 sum; and how float32 products round."""
    rounding(bench)
    for n, d, vocab in bench.shapes:
        w = torch.randn(vocab, d, device=bench.meter.device, dtype=torch.bfloat16)
        for rows in dict.fromkeys((n, *(r for r in (4096, 1024) if r < n))):
            x, _, _ = batch(bench, rows, vocab, -(-vocab // 16) * 16)
            h = torch.randn(rows, d, device=w.device, dtype=w.dtype)
            for name, product in kinds_of_product(x, h, w).items():
                timed(bench, f"{name}, {rows} × {d} × {vocab}", product, computed=2 * rows * d * vocab)
            del x, product
        del w
        bench.meter.free()


def rounding(bench: Bench) -> None:
    """Errors of the gradient of hidden states in float32, the classes added up in one to sixteen products."""
    features, vocab = (8, 300) if bench.toy else (192, 50257)
    w = torch.randn(vocab, features, device=bench.meter.device) / features**0.5
    for rows in (5,) if bench.toy else (3001, 2700, 1501, 512):
        grad = (3 * torch.randn(rows, vocab, device=w.device)).softmax(-1)
        truth = grad.double() @ w.double()
        for parts in (1, 4, 8, 16):
            total = grad.new_zeros(rows, features)
            for g, some in zip(grad.chunk(parts, 1), w.chunk(parts), strict=True):
                total.addmm_(g, some)
            error = float((total - truth).norm() / truth.norm())
            what = f"float32 product over {vocab} classes, {rows} rows"
            bench.rows.add("note", what=what, products=parts, relative_error=error)


def kinds_of_product(x: Tensor, h: Tensor, w: Tensor) -> dict[str, Run]:
    steps: dict[str, Run] = {
        "logits": partial(torch.mm, h, w.T, out=x),
        "by hidden, bfloat16": partial(torch.mm, x, w),
        "by weight, bfloat16": partial(torch.mm, x.T, h),
    }
    if x.is_cuda:
        sum_h, sum_w = (torch.zeros(t.shape, device=t.device) for t in (h, w))
        wide = partial(torch.addmm, out_dtype=torch.float32)
        steps |= {
            "by hidden, float32": partial(wide, sum_h, x, w, beta=0, out=sum_h),
            "by weight, float32": partial(wide, sum_w, x.T, h, beta=0, out=sum_w),
            "by weight, added to float32": partial(wide, sum_w, x.T, h, beta=1, out=sum_w),
        }
    return steps
