"""Losses and gradients beside plain PyTorch in float64, under `torch.compile`, and in CUDA graphs."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.engine import Options, linear_nll_sum, part_nll
from benchmarks.gpu.plan import Shape
from benchmarks.measure import Bar
from nvamp import LinearNVAMPLoss, NVAMPLoss
from nvamp.functional import linear_token_nll, token_nll
from nvamp.ranks import ALONE

CHECKED: list[Shape] = [(333, 96, 1003), (3001, 192, 50257)]  # the second in several chunks
TOY_CHECKED: list[Shape] = [(40, 8, 65), (70, 8, 130)]
LARGE, TOY_LARGE = (16411, 131101), (80, 70)  # N, V: more than 2³¹ logits
MANY = 64  # rows of these to compare: with only a few, rounding would be a matter of luck

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OPTIONS = {"label_smoothing": 0.1, "z_loss": 1e-4, "softcap": 3.0, "logit_scale": 0.7}  # a cap that bends
# A sum of losses is multiplied by these. One factor is not enough: how the gradient of a label rounds is a
# matter of luck, and the same for all labels.
SCALES = (1.1, 1.37, 1.7)
ROUNDING = torch.finfo(torch.bfloat16).eps  # two orders of the same bfloat16 arithmetic differ by less

A_FEW = "linear, one pass, a twentieth of the tokens with more weight"
ENTROPY, BONUS = "less entropy", 0.3

Results = dict[str, Tensor]
Losses = Callable[..., tuple[Tensor, Tensor]]  # inputs -> loss of each token, and their differentiable sum


def accuracy(bench: Bench) -> None:
    """Checks that errors are at most a tenth larger than eager PyTorch's."""
    device, toy = bench.meter.device, bench.toy
    shapes = TOY_CHECKED if toy else CHECKED
    check(bench, "inplace_backward", partial(in_place, device, shapes[-1]))
    check(bench, "many logits", partial(many_logits, device, *(TOY_LARGE if toy else LARGE)))
    plain: list[tuple[Shape, dict[str, Any]]] = [(shape, {}) for shape in shapes]
    variants = [*plain, (shapes[0], OPTIONS), (shapes[0], {"masked": True})]
    for shape, options in variants:
        for dtype in DTYPES:
            for backend in ("chunked",) if toy else ("triton", "chunked"):
                name = " ".join(map(str, (str(dtype)[6:], backend, shape, *options)))
                check(bench, name, partial(errors, name, device, dtype, shape, backend, **options))


def compile(bench: Bench) -> None:
    shape, compiler = (TOY_CHECKED[-1], "aot_eager") if bench.toy else (CHECKED[-1], "inductor")
    check(bench, "torch.compile", partial(compiled, bench.meter.device, shape, compiler))


def graphs(bench: Bench) -> None:
    """Checks what only a GPU has: CUDA graphs, and steps that do not wait for the device."""
    if not bench.meter.on_gpu:
        return
    for backend in ("triton", "chunked"):
        check(bench, f"CUDA graph, {backend}", partial(captured, bench.meter.device, CHECKED[-1], backend))
        check(bench, f"no waiting, {backend}", partial(unwaiting, bench.meter.device, CHECKED[-1], backend))


def check(bench: Bench, what: str, bars: Callable[[], Iterator[Bar]]) -> None:
    slack = 2 if bench.toy else 1  # the rounding of a few numbers is a matter of luck

    def write() -> None:
        for bar in bars():
            bench.rows.check(bar.what, bar.measured, bar.limit * slack)

    bench.attempt(what, write)


def batch(device: torch.device, shape: Shape, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, ...]:
    """Hidden states, a weight and labels, a tenth of them ignored; the logits have a deviation of 1."""
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
    weights: Tensor | float = 1.0,
    bonus: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The losses from logits, or from hidden states and weight, in plain PyTorch; float64 for float64 inputs.

    Their sum is weighted by `weights`. From each loss, `bonus` times the entropy of the prediction is taken.
    """
    x = inputs[0] if len(inputs) == 1 else inputs[0] @ inputs[1].T
    z = logit_scale * (x if x.dtype == torch.float64 else x.float())
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    nll = F.cross_entropy(z, y, reduction="none", label_smoothing=label_smoothing)
    more = z_loss * z.logsumexp(-1).square() - (bonus * entropy_of(z) if bonus else 0)
    return summed(nll + torch.where(y == -100, 0, more), weights)


def entropy_of(z: Tensor) -> Tensor:
    logprob = z.log_softmax(-1)
    return -(logprob.exp() * logprob.masked_fill(logprob == -torch.inf, 0)).sum(-1)


def solve(losses: Losses, inputs: Results, rows: Tensor | slice = slice(None)) -> Results:
    """For some rows, the losses, and the gradients of multiples of their sum with respect to each input."""
    found = []
    for scale in SCALES:
        leaves = [x.detach().requires_grad_() for x in inputs.values()]
        nll, total = losses(*leaves)
        found.append([g[rows] for g in torch.autograd.grad(scale * total, leaves)])
    gradients = zip(inputs, map(torch.stack, zip(*found, strict=True)), strict=True)
    return {"losses": nll.detach()[rows]} | {f"gradient by {name}": g for name, g in gradients}


def summed(nll: Tensor, weights: Tensor | float = 1.0) -> tuple[Tensor, Tensor]:
    return nll, (weights * nll).sum()


def relative_error(x: Tensor, truth: Tensor) -> float:
    return float((x.double() - truth.double()).norm() / truth.double().norm())


def against_eager(what: str, ours: Results, plain: Losses, inputs: Results) -> Iterator[Bar]:
    """Errors against float64 over those of plain PyTorch in the dtype of the inputs."""
    truth, eager = solve(plain, {name: x.double() for name, x in inputs.items()}), solve(plain, inputs)
    for name, t in truth.items():
        ratio = relative_error(ours[name], t) / relative_error(eager[name], t)
        yield Bar(f"{what}, {name}: error over eager's", ratio, 1.1)


def errors(
    what: str,
    device: torch.device,
    dtype: torch.dtype,
    shape: Shape,
    backend: str,
    masked: bool = False,
    **options: Any,
) -> Iterator[Bar]:
    """The errors of all paths. With `masked`, half of the logits are −inf in the path from logits."""
    n, _, vocab = shape
    labelled = vocab // 2 if masked else vocab
    h, w, y = batch(device, shape, dtype)
    y = torch.where(y == -100, y, y % labelled)
    x = 3 * torch.randn(n, vocab, device=device, dtype=dtype)
    x[:, labelled:] = -torch.inf

    extra = torch.zeros(n, device=device).index_fill_(0, torch.arange(0, n, 20, device=device), 0.7)

    def one_pass(h: Tensor, w: Tensor, few: int) -> tuple[Tensor, Tensor]:
        total, nll = linear_nll_sum(h, w, y, few=few, backend=backend, **options)
        return nll, total + (extra * nll).sum() if few else total

    def less_entropy(primitive: Callable[..., Any], *inputs: Tensor) -> tuple[Tensor, Tensor]:
        nll, metrics = primitive(*inputs, y, return_metrics=True, backend=backend, **options)
        return summed(nll - BONUS * metrics.entropy)

    paths: dict[str, tuple[Losses, Results]] = {
        "logits": (lambda x: summed(token_nll(x, y, backend=backend, **options)), {"logits": x}),
        "logits, as a part of a vocabulary that is all of it": (
            lambda x: summed(part_nll(x, y, 0, False, backend, Options(**options), ALONE)[0]),
            {"logits": x},
        ),
        "linear, recompute": (
            lambda h, w: summed(linear_token_nll(h, w, y, backend=backend, **options)),
            {"hidden": h, "weight": w},
        ),
        f"logits, {ENTROPY}": (lambda x: less_entropy(token_nll, x), {"logits": x}),
        f"linear, {ENTROPY}": (
            lambda h, w: less_entropy(linear_token_nll, h, w),
            {"hidden": h, "weight": w},
        ),
    }
    if dtype != torch.float16:  # no loss takes one pass in float16
        for path, few in (("linear, one pass", 0), (A_FEW, -(-n // 20))):
            paths[path] = (partial(one_pass, few=few), {"hidden": h, "weight": w})
    for path, (losses, inputs) in paths.items():
        weights, bonus = 1 + extra if path == A_FEW else 1.0, BONUS if path.endswith(ENTROPY) else 0.0
        plain = partial(definition, y=y, weights=weights, bonus=bonus, **options)
        yield from against_eager(f"{what}, {path}", solve(losses, inputs), plain, inputs)


def many_logits(device: torch.device, n: int, vocab: int) -> Iterator[Bar]:
    """Compares some rows of many; the others only make the batch large."""
    x = torch.randn(n, vocab, device=device, dtype=torch.bfloat16)
    y = torch.randint(vocab, (n,), device=device)
    rows = torch.linspace(0, n - 1, MANY, device=device, dtype=torch.float64).round().long()
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
    """A loss, and its gradients with respect to all inputs but the labels."""
    loss = criterion(*inputs)
    return [loss.detach(), *torch.autograd.grad(loss, inputs[:-1])]


def alike(what: str, results: list[Tensor], expected: list[Tensor]) -> Iterator[Bar]:
    for i, (x, truth) in enumerate(zip(results, expected, strict=True)):
        yield Bar(f"{what}, result {i}: difference from eager execution", relative_error(x, truth), ROUNDING)


def compiled(device: torch.device, shape: Shape, compiler: str) -> Iterator[Bar]:
    """Checks that one compilation serves any number of tokens; a second one would raise."""
    torch.compiler.reset()  # earlier compilations do not count
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
    """Losses from logits, in one pass and with recomputing, each with its inputs."""
    h, w, y = batch(device, shape)
    x = (h @ w.T).detach().requires_grad_()
    options: dict[str, Any] = {"shift": False, "backend": backend}
    return {
        "logits": (NVAMPLoss(**options), [x, y]),
        "one pass": (LinearNVAMPLoss(**options), [h, w, y]),
        "one pass, tail": (LinearNVAMPLoss(gamma=0.04, tail=0.05, **options), [h, w, y]),
        "recompute": (LinearNVAMPLoss(gradient="token", **options), [h, w, y]),
    }


def captured(device: torch.device, shape: Shape, backend: str) -> Iterator[Bar]:
    """Checks that a CUDA graph, captured on one batch, computes another right."""
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
    """Checks that steps do not wait, but for recomputing: once per direction, for the number of labels."""
    losses = losses_on(device, shape, backend)
    for path in ("logits", "one pass", "one pass, tail"):
        loss, inputs = losses[path]
        step(loss, *inputs)
        torch.cuda.set_sync_debug_mode("error")
        try:
            step(loss, *inputs)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        yield Bar(f"{path}, {backend}: waits for the device", 0, 0)
