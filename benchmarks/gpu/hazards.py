"""Checks of the kernels that only a GPU can do: races, alignment, streams, the edges of rows and memory."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.engine import Options, triton
from nvamp import LinearNVAMPLoss
from nvamp.objectives import GRADIENTS, Gradient

# Rows, vocabulary, elements from row to row, dtype, runs. More rows than fit on the card make programs follow
# others; without room between rows of an odd vocabulary, a write beyond a row shows.
IN_PLACE = [
    (528, 1003, 1008, torch.bfloat16, 20),
    (2640, 50257, 50272, torch.bfloat16, 20),
    (2640, 50257, 50257, torch.bfloat16, 20),
    (2640, 128256, 128256, torch.bfloat16, 20),
    (792, 262144, 262144, torch.bfloat16, 10),
    (792, 128256, 128256, torch.float32, 10),
    (528, 50257, 50272, torch.float16, 10),
]
TOY_IN_PLACE = [(9, 257, 272, torch.float32, 2), (5, 129, 129, torch.bfloat16, 2)]
GUARD = 7.0


def hazards(bench: Bench) -> None:
    for case in TOY_IN_PLACE if bench.toy else IN_PLACE:
        bench.attempt(f"unit gradient, {case}", partial(unit_gradient, bench, *case))
    n, vocab = (5, 131) if bench.toy else (300, 50257)
    for name, make in layouts(n, vocab, bench.meter.device).items():
        for dtype in (torch.bfloat16, torch.float32):
            what = f"logits, {name}, {str(dtype).removeprefix('torch.')}"
            bench.attempt(what, partial(from_logits, bench, what, make, dtype))
    bench.attempt("labels out of range", partial(labels_out_of_range, bench))
    if bench.meter.on_gpu:
        bench.attempt("current stream", partial(current_stream, bench))
    for gradient in GRADIENTS:
        bench.attempt(f"linear path, {gradient}", partial(against_chunked, bench, gradient))
    if bench.meter.on_gpu:
        bench.attempt("registers", partial(registers, bench), ours=False)


def largest(x: Tensor) -> float:
    return float(x.abs().max())


def unit_gradient(bench: Bench, n: int, vocab: int, pitch: int, dtype: torch.dtype, runs: int) -> None:
    """Checks in-place gradients: the same bits each time, correct row edges, and nothing written around."""
    device = bench.meter.device
    guarded = torch.full((n + 2, pitch), GUARD, device=device, dtype=dtype)
    guarded[1:-1, vocab:] = torch.nan  # what lies between rows must not count
    x, y = 3 * torch.randn(n, vocab, device=device, dtype=dtype), edge_labels(n, vocab, dtype, device)
    rows = guarded[1:-1, :vocab]
    nll, differ = torch.empty(0), 0
    for run in range(runs):
        rows.copy_(x)
        found = triton.unit_gradient_(rows, y, Options())
        if run == 0:
            nll, grad = found, rows.clone()
        differ += not (torch.equal(found, nll) and torch.equal(rows, grad))
    what = f"unit gradient, {n} × {vocab} of {pitch}, {str(dtype).removeprefix('torch.')}"
    bench.rows.check(f"{what}: runs that differ from the first", differ, 0)
    bench.rows.check(f"{what}: rows around written to", largest(guarded[[0, -1]].float() - GUARD), 0)
    # The rows with labels at edges, the last rows and the ignored one.
    some = torch.tensor(sorted({*range(min(n, 160)), *range(max(n - 8, 0), n), n // 2}), device=device)
    _errors(bench, what, x[some], y[some], nll[some], rows[some])


def edge_labels(n: int, vocab: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Labels at the first and last columns of rows and of blocks; one row is ignored."""
    block = triton.revisiting(vocab, dtype, False).block
    edges = [0, 1, vocab - 1, vocab - 2]
    edges += [e for k in range(block, vocab + 1, block) for e in (k - 1, k) if e < vocab]
    y = torch.randint(vocab, (n,), device=device)
    y[: len(edges)] = torch.tensor(edges[:n], device=device)
    y[n // 2] = -100
    return y


def _errors(bench: Bench, what: str, x: Tensor, y: Tensor, nll: Tensor, grad: Tensor) -> None:
    """Losses and unit gradients of some rows, beside float64."""
    z, ignored = x.double(), y == -100
    expected = F.cross_entropy(z, y, reduction="none")
    p = z.softmax(-1)
    at = F.one_hot(y.clamp(min=0), z.shape[1]).bool() & ~ignored[:, None]
    p[at] -= 1
    p[ignored] = 0
    error = (grad.double() - p).abs()
    bench.rows.check(f"{what}: losses", largest(nll.double() - expected), 1e-4)
    bench.rows.check(f"{what}: gradient of the label", largest(error[at]), 2**-8)
    if x.dtype != torch.float16:  # it rounds small gradients to 0
        limit = 1e-4 if x.dtype == torch.float32 else 2**-7
        bench.rows.check(f"{what}: relative error", largest(error / p.abs().clamp(min=1e-30)), limit)


def layouts(n: int, vocab: int, device: torch.device) -> dict[str, Callable[[torch.dtype], Tensor]]:
    def normal(*shape: int) -> Callable[[torch.dtype], Tensor]:
        return lambda dtype: torch.randn(*shape, device=device).to(dtype)

    return {
        "contiguous": normal(n, vocab),
        "odd start": lambda dtype: normal(n * vocab + 1)(dtype)[1:].view(n, vocab),
        "shifted": lambda dtype: normal(4, n, vocab)(dtype)[:, :-1],
        "transposed": lambda dtype: normal(vocab, n)(dtype).T,
        "expanded": lambda dtype: normal(1, vocab)(dtype).expand(n, vocab),
    }


def from_logits(bench: Bench, what: str, make: Callable[[torch.dtype], Tensor], dtype: torch.dtype) -> None:
    x, device = make(dtype), bench.meter.device
    y = torch.randint(x.shape[-1], x.shape[:-1], device=device)
    nll, norm, *_ = triton.token_nll(x, y, False, Options())
    weights = torch.rand(nll.shape, device=device)
    out = torch.full(x.shape, 9.0, device=device, dtype=dtype)
    triton.token_nll_backward(weights, x, y, norm, Options(), out=out)
    z = x.double()
    expected = z.logsumexp(-1) - z.gather(-1, y[..., None])[..., 0]
    grad = z.softmax(-1).scatter_add_(-1, y[..., None], -torch.ones_like(z[..., :1])) * weights[..., None]
    bench.rows.check(f"{what}: losses", largest(nll - expected), 1e-4)
    bench.rows.check(f"{what}: gradient", float((out - grad).norm() / grad.norm()), 2**-7)
    if 0 not in x.stride():
        triton.token_nll_backward(weights, x, y, norm, Options(), out=x)
        bench.rows.check(f"{what}: gradient in place", float((x - grad).norm() / grad.norm()), 2**-7)


def labels_out_of_range(bench: Bench) -> None:
    x = torch.randn(64, 1003, device=bench.meter.device)
    y = torch.randint(1003, (64,), device=bench.meter.device)
    y[3], y[5] = 1003, -7
    nll = triton.token_nll(x, y, False, Options())[0]
    expected = (y >= 1003) | (y < 0)
    bench.rows.check(
        "labels out of range: losses that are not NaN, or others that are",
        float((nll.isnan() != expected).sum()),
        0,
    )


def current_stream(bench: Bench) -> None:
    """Checks work on another stream that is queued behind an input that comes late."""
    device = bench.meter.device
    base = torch.randn(4096, 50257, device=device, dtype=torch.bfloat16)
    x, y = base.clone(), torch.randint(50257, (4096,), device=device)
    bench.meter.sync()
    side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)  # type: ignore[no-untyped-call]
        torch.mul(base, 2, out=x)
        late = triton.token_nll(x, y, False, Options())[0]
    side.synchronize()
    expected = triton.token_nll(base * 2, y, False, Options())[0]
    bench.rows.check("current stream: losses that differ", float((late != expected).sum()), 0)


def against_chunked(bench: Bench, gradient: Gradient) -> None:
    """Compares the linear path with its kernels to the same without them."""
    n, d, vocab = (21, 8, 131) if bench.toy else (3001, 192, 50257)
    device = bench.meter.device
    h = torch.randn(n, d, device=device, dtype=torch.bfloat16, requires_grad=True)
    w = torch.randn(vocab, d, device=device, dtype=torch.bfloat16).div_(d**0.5).requires_grad_()
    y = torch.randint(vocab, (n,), device=device)

    def solve(backend: str) -> tuple[Tensor, ...]:
        loss = LinearNVAMPLoss(shift=False, gradient=gradient, backend=backend)(h, w, y)
        return loss.detach(), *torch.autograd.grad(loss, (h, w))

    names = ("loss", "gradient by hidden", "gradient by weight")
    for name, ours, plain in zip(names, solve("triton"), solve("chunked"), strict=True):
        error = float((ours.double() - plain.double()).norm() / plain.double().norm())
        bench.rows.check(f"linear path, {gradient}: {name}", error, 1e-4 if name == "loss" else 2**-6)


def registers(bench: Bench) -> None:
    """The resources of the kernels that ran, from Triton's caches, which are not public and may change."""
    found = vars(vars(triton)["kernels"]).values()
    for kernel in (k for k in found if hasattr(k, "device_caches")):
        for cache in kernel.device_caches.values():
            for c in list(cache[0].values())[:6]:
                what = f"{c.name}, {c.metadata.num_warps} warps"
                bench.rows.add(
                    "kernel", what=what, registers=c.n_regs, spills=c.n_spills, shared=c.metadata.shared
                )
