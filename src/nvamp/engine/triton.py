"""Backend `triton`: one kernel for each thing done to rows of logits.

The forward reads the logits once. The backward reads them once and writes the gradient once. The linear path
reads a chunk twice, the second time from the cache, and writes it once.

This module launches the kernels of `nvamp.engine.kernels`. They are written for any GPU that Triton serves;
with TRITON_INTERPRET=1 they run on CPU tensors too, slowly.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from nvamp.engine import kernels
from nvamp.engine.backend import Chunk, Largest, OfEntropy
from nvamp.engine.options import Options, accumulate_dtype, weights_of

INTERPRETED = not isinstance(kernels.nll_kernel, triton.JITFunction)
WARP = 64 if torch.version.hip else 32
WIDE = {torch.float32: triton.language.float32, torch.float64: triton.language.float64}


NUMBERS = [name for name in Options._fields if name not in ("ignore_index", "class_weight")]


class Launch(NamedTuple):
    """The columns that a program takes at a time, and its warps."""

    block: int
    num_warps: int

    @property
    def meta(self) -> dict[str, Any]:
        return {"BLOCK": self.block, "num_warps": self.num_warps, "enable_fp_fusion": True}

    def lanes(self, dtype: torch.dtype) -> dict[str, int]:
        """How the threads of a program share out a block: whole vectors of 16 bytes."""
        vector = 16 // dtype.itemsize
        return {"LANES": max(min(WARP * self.num_warps, self.block // vector), 1), "VECTOR": vector}


FEW_ROWS = 256  # the multiprocessors of the largest GPUs, rounded up


# These sizes were the fastest on an H100, or within 4% of the fastest: docs/engine.md.


def reading(columns: int, dtype: torch.dtype, capped: bool, rows: int, metrics: bool = False) -> Launch:
    """The launch of the kernel that reads a row once: many programs, which hide each other's waiting.

    512 threads take 16 KiB; metrics need registers, so there 256 threads take 8 KiB. Few rows make few
    programs, so each is as large as possible.
    """
    most, threads = (32768, 1024) if rows <= FEW_ROWS else (8192, 256) if metrics else (16384, 512)
    return _launch_of(columns, dtype, most, threads, capped)


def streaming(columns: int, dtype: torch.dtype, capped: bool) -> Launch:
    """The launch of kernels that read and write one block a program: 256 threads take 16 KiB."""
    return _launch_of(columns, dtype, most=16384, threads=256, capped=capped)


def revisiting(columns: int, dtype: torch.dtype, capped: bool) -> Launch:
    """The launch of the kernel that reads rows twice: the largest programs, one to a multiprocessor.

    The rows in progress then stay in the L2 cache. On an H100 there are 132, or 32 MiB for a vocabulary of
    128k in half precision, and the cache has 50 MiB. A row takes several blocks, so that some are loading
    while one is worked on.
    """
    most = 32768 if columns * dtype.itemsize > 128 * 1024 else 16384
    return _launch_of(columns, dtype, most, threads=1024, capped=capped)


@cache  # it costs the host more than a small kernel
def _launch_of(columns: int, dtype: torch.dtype, most: int, threads: int, capped: bool) -> Launch:
    """Blocks of at most `most` bytes, half if capped, by `threads` threads, or fewer for a smaller block."""
    most_columns = most // dtype.itemsize // (1 + capped)
    block = min(max(triton.next_power_of_2(columns), 16 // dtype.itemsize), most_columns)
    return Launch(block, max(threads * block // most_columns // WARP, 1))


def number(x: float, like: Tensor) -> Any:
    """A kernel argument in the dtype of `like`. A float64 lies in memory: not every GPU has such scalars."""
    return like.new_full((), x) if like.dtype == torch.float64 else x


def options_of(opt: Options, like: Tensor) -> dict[str, Any]:
    """The arguments that every kernel on logits takes, with numbers in the dtype of `like`, the losses."""
    numbers = {name: getattr(opt, name) or 0.0 for name in NUMBERS}
    return {
        "ignore_index": opt.ignore_index,
        **{name: number(x, like) for name, x in numbers.items()},
        "WIDE": WIDE[like.dtype],
        "CAPPED": opt.softcap is not None,
        "SCALED": opt.logit_scale != 1,
        "SMOOTHED": opt.label_smoothing != 0,
        "Z_LOSS": opt.z_loss != 0,
    }


def launch(kernel: Any, programs: int, sizes: Launch, *args: Any, **constants: Any) -> None:
    """Runs `programs` programs of a kernel on the device of its first argument."""
    device = args[0].device
    if device.type == "cpu" and not INTERPRETED:
        raise ValueError(
            'backend="triton" needs tensors on a GPU, got some on the CPU; to run its kernels there, slowly, '
            "set TRITON_INTERPRET=1 before Triton is imported"
        )
    here = nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device)
    with here:
        if programs:
            kernel[(programs,)](*args, **sizes.meta, **constants)


def _planes(logits: Tensor, start: int = 0) -> Iterator[tuple[Tensor, slice]]:
    """logits [..., V] as tensors [outer, inner, V], never copied, and the slice of rows of each.

    If the rows are evenly spaced, outer is 1, and the pitch is the only size or stride that a kernel needs.
    """
    vocab = logits.shape[-1]
    for shape in ((1, -1, vocab), (-1, *logits.shape[-2:])):
        try:
            x = logits.view(shape)
        except RuntimeError:  # these leading dimensions cannot be merged
            continue
        yield x, slice(start, start + x.shape[0] * x.shape[1])
        return
    for part in logits:
        yield from _planes(part, start)
        start += part.numel() // vocab


def _strides(x: Tensor) -> tuple[int, int, int]:
    """The strides of x [outer, inner, V]; 0 for an outer of 1, or each number of rows would compile anew."""
    return 0 if len(x) == 1 else x.stride(0), x.stride(1), x.stride(2)


def _alike(x: Tensor, out: Tensor) -> bool:
    """Whether every element of `out` is as far from a boundary of 16 bytes as its counterpart in x."""
    bytes_apart = [x.data_ptr() - out.data_ptr()]
    bytes_apart += [(a - b) * x.itemsize for a, b in zip(_strides(x), _strides(out), strict=True)]
    return all(n % 16 == 0 for n in bytes_apart)


# The backend -------------------------------------------------------------------------------------------


def token_nll(logits: Tensor, labels: Tensor, metrics: int, opt: Options) -> tuple[Tensor, ...]:
    sum_below = _room_for_sums(logits, labels) if metrics > 2 else None
    nll, norm, *rest = _pass_over(logits, labels, sum_below, False, metrics, opt)
    if sum_below is not None:
        rest.append(norm[..., 0] - sum_below / logits.shape[-1])
    weights = weights_of(labels, opt)
    if weights is not None:
        nll *= weights[..., 1]
    return nll, norm, *rest


def part_statistics(logits: Tensor, labels: Tensor, metrics: int, opt: Options) -> tuple[Tensor, ...]:
    sum_below = _room_for_sums(logits, labels)
    summed = opt.label_smoothing or metrics > 2
    at_label, norm, *rest = _pass_over(logits, labels, sum_below if summed else None, True, metrics, opt)
    return norm, at_label, sum_below, *rest, *([sum_below.clone()] if metrics > 2 else [])


def _room_for_sums(logits: Tensor, labels: Tensor) -> Tensor:
    return torch.zeros(labels.shape, dtype=accumulate_dtype(logits.dtype), device=labels.device)


def _pass_over(
    logits: Tensor, labels: Tensor, sum_below: Tensor | None, part: bool, metrics: int, opt: Options
) -> tuple[Tensor, ...]:
    """The results of `nll_kernel`, for a `part` of the vocabulary if it is one. It fills `sum_below`."""
    wide, vocab = accumulate_dtype(logits.dtype), logits.shape[-1]
    nll = torch.empty(labels.shape, dtype=wide, device=labels.device)
    norm = nll.new_empty(*labels.shape, 2)
    entropy = torch.empty_like(nll) if metrics else None  # the kernel does not see a None at all
    prediction = torch.empty_like(nll, dtype=torch.int64) if metrics else None
    of_rows = (labels, nll, norm, entropy, prediction, sum_below)
    flat = [None if t is None else t.contiguous().flatten(0, labels.dim() - 1) for t in of_rows]
    sizes = reading(vocab, logits.dtype, opt.softcap is not None, labels.numel(), metrics > 0)
    for x, rows in _planes(logits):
        launch(
            kernels.nll_kernel,
            x.shape[0] * x.shape[1],
            sizes,
            x,
            *(None if t is None else t[rows] for t in flat),
            x.shape[1],
            *_strides(x),
            vocab,
            METRICS=metrics > 0,
            PART=part,
            SUM=sum_below is not None,
            ADJACENT=x.stride(-1) == 1,
            **sizes.lanes(logits.dtype),
            **options_of(opt, nll),
        )
    return (nll, norm) if entropy is None or prediction is None else (nll, norm, entropy, prediction)


def token_nll_backward(
    grad_nll: Tensor,
    logits: Tensor,
    labels: Tensor,
    norm: Tensor,
    opt: Options,
    out: Tensor,
    classes: Tensor | None = None,
    of_entropy: OfEntropy | None = None,
    weights: Tensor | None = None,
) -> None:
    vocab = logits.shape[-1]
    weights = weights_of(labels, opt) if weights is None else weights
    if weights is not None:
        grad_nll = grad_nll * weights[..., 1]
    sizes = streaming(vocab, logits.dtype, opt.softcap is not None)
    of_rows = (labels, norm, grad_nll, *(of_entropy or (None, None)))
    flat = [None if t is None else t.contiguous().flatten(0, labels.dim() - 1) for t in of_rows]
    for x, rows in _planes(logits):
        grad = x if out is logits else out.view(-1, vocab)[rows].view(x.shape)
        launch(
            kernels.gradient_kernel,
            x.shape[0] * x.shape[1] * triton.cdiv(vocab, sizes.block),
            sizes,
            x,
            grad,
            *(None if t is None else t[rows] for t in flat),
            labels if classes is None else classes,
            x.shape[1],
            *_strides(x),
            *_strides(grad),
            vocab,
            ENTROPY=of_entropy is not None,
            PART=classes is not None,
            ADJACENT=x.stride(-1) == 1,  # and grad is x, or contiguous
            ALIKE=_alike(x, grad),
            **sizes.lanes(logits.dtype),
            **options_of(opt, norm),
        )


def unit_gradient_(logits: Tensor, labels: Tensor, opt: Options) -> Tensor:
    if opt.class_weight is not None:  # the kernel weighs all rows alike
        nll, norm = token_nll(logits, labels, False, opt)
        token_nll_backward(torch.ones_like(nll), logits, labels, norm, opt, out=logits)
        return nll
    rows, vocab = logits.shape
    nll = logits.new_empty(rows, dtype=accumulate_dtype(logits.dtype))
    sizes = revisiting(vocab, logits.dtype, opt.softcap is not None)
    launch(
        kernels.unit_gradient_kernel,
        rows,
        sizes,
        logits,
        labels.contiguous(),
        nll,
        logits.stride(0),
        vocab,
        **sizes.lanes(logits.dtype),
        **options_of(opt, nll),
    )
    return nll


def keep_largest(largest: Largest, chunk: Chunk, opt: Options) -> None:
    (rows, vocab), features = chunk.grad.shape, chunk.hidden.shape[1]
    sizes = Launch(1024, 4)
    launch(
        kernels.keep_largest_kernel,
        triton.cdiv(max(vocab, features), sizes.block),
        sizes,
        chunk.nll,
        chunk.labels.contiguous(),
        chunk.grad,
        chunk.hidden,
        largest.loss,
        largest.row,
        largest.grad,
        largest.hidden,
        chunk.number,
        chunk.start,
        rows,
        chunk.grad.stride(0),
        *chunk.hidden.stride(),
        vocab,
        features,
        opt.ignore_index,
    )


def scale_and_add(x: Tensor, a: Tensor, b: Tensor | None, u: Tensor, v: Tensor, out: Tensor) -> None:
    rows, columns = x.shape
    launch(
        kernels.scale_and_add_kernel,
        rows,
        streaming(columns, x.dtype, capped=False),
        x,
        out,
        a,
        a if b is None else b,
        u.contiguous(),
        v.contiguous(),
        columns,
        HAS_B=b is not None,
        WIDE=WIDE[accumulate_dtype(x.dtype)],
    )
