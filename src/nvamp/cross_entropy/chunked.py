"""Backend `chunked`: plain PyTorch on any device, one block of rows at a time.

A block is so small that it stays in the cache of a CPU while several operations pass over it, and so large
that it fills a GPU. Softmax is recomputed in the backward; nothing of the size of the logits is kept beside
them. The linear path makes one chunk of logits at a time and turns it into its gradient in place.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from nvamp.cross_entropy.checks import check_label_range
from nvamp.cross_entropy.hugepages import in_huge_pages
from nvamp.cross_entropy.options import Head, Needs, Options, accumulate_dtype

MiB = 2**20
# A half-precision product is rounded to half precision before it can be added up. Up to this many chunks,
# adding up in float32 as well lowers the error too little to pay for its memory; see docs/engine.md.
FEW_CHUNKS = 4


def block_rows(vocab: int, dtype: torch.dtype, device: torch.device) -> int:
    """Rows of a block: its softmax fills a core's share of cache on a CPU, and 256 MiB elsewhere."""
    threads = torch.get_num_threads() if device.type == "cpu" else 256
    return max(threads * MiB // (vocab * accumulate_dtype(dtype).itemsize), threads)


def chunk_rows(weight: Tensor) -> int:
    """Rows of a chunk of logits of weight [V, D]: enough for an efficient matrix product.

    Room is for a row of logits, a copy of its hidden state and a gradient of that.
    """
    vocab, features = weight.shape
    size = 52 * MiB if weight.device.type == "cpu" else 512 * MiB
    return max(size // ((vocab + 2 * features) * weight.itemsize), 1)


def can_look(x: Tensor) -> bool:
    """Whether a look at the data costs nothing. On other devices than a CPU it would wait for the device."""
    return x.device.type == "cpu"


# Labels ------------------------------------------------------------------------------------------------


class Targets(NamedTuple):
    """Labels [tokens] that are safe to gather with, and what is wrong with the ones that were not."""

    label: Tensor  # int64 in [0, V); 0 where there is none
    ignored: Tensor | None  # bool, None where known to be nowhere
    invalid: Tensor | None  # bool, None where known to be nowhere

    def rows(self, where: slice) -> "Targets":
        return Targets(*(None if t is None else t[where] for t in self))  # type: ignore[arg-type]

    @property
    def none(self) -> bool:
        """No row has a label, as where prompts are masked. False where it cannot look."""
        return self.ignored is not None and can_look(self.ignored) and bool(self.ignored.all())


def targets_of(labels: Tensor, vocab: int, ignore_index: int) -> Targets:
    """`Targets` of labels [...], flattened.

    Raises:
        ValueError: on a CPU, where a label is neither `ignore_index` nor in [0, vocab). On other devices,
            where looking would wait for the device, the loss of such a token is NaN.
    """
    labels = labels.flatten().long()
    ignored = labels == ignore_index
    invalid = ~ignored & ((labels < 0) | (labels >= vocab))
    label = torch.where(ignored | invalid, 0, labels)
    if not can_look(labels):
        return Targets(label, ignored, invalid)
    check_label_range(labels, invalid, vocab, ignore_index)
    return Targets(label, ignored if ignored.any() else None, None)


# One block ---------------------------------------------------------------------------------------------


def _activate(x: Tensor, opt: Options, out: Tensor, want_slope: bool) -> tuple[Tensor, Tensor | None]:
    """z of a block [rows, V] of logits x, and with `softcap` dz/dx (without the scale) if wanted.

    z is x itself where it may be, else `out`.
    """
    if x.dtype == out.dtype and opt.logit_scale == 1 and opt.softcap is None:
        return x, None
    z = out.copy_(x)
    if opt.logit_scale != 1:
        z.mul_(opt.logit_scale)
    if opt.softcap is None:
        return z, None
    tanh = z.div_(opt.softcap).tanh_()
    slope = 1 - tanh.square() if want_slope else None
    return tanh.mul_(opt.softcap), slope


def _losses(z: Tensor, targets: Targets, opt: Options, out: Tensor) -> tuple[Tensor, Tensor]:
    """Losses and log-sum-exp [rows] of a block z [rows, V]; leaves softmax(z) in `out`, which may be z."""
    top = z.amax(-1)
    below_top = top - z.gather(1, targets.label[:, None])[:, 0]
    if opt.label_smoothing:
        below_top = torch.lerp(below_top, top - z.mean(-1), opt.label_smoothing)
    # The largest probability is 1 / Σ exp(z − top).
    log_sum = -torch.softmax(z, -1, out=out).amax(-1).log_()
    lse = top + log_sum
    nll = log_sum + below_top
    if opt.z_loss:
        nll += opt.z_loss * lse.square()
    if targets.ignored is not None:
        nll.masked_fill_(targets.ignored, 0)
    if targets.invalid is not None:
        nll.masked_fill_(targets.invalid, torch.nan)
    return nll, lse


def _to_gradient(
    p: Tensor, lse: Tensor, slope: Tensor | None, targets: Targets, grad_nll: Tensor, opt: Options
) -> None:
    """Makes of the softmax p [rows, V] of a block, in place, the gradient of Σ grad_nll·nll by its logits."""
    # dnll/dz = p·(1 + 2·z_loss·lse) − (1 − label_smoothing)·[v = y] − label_smoothing/V
    w = (grad_nll * opt.logit_scale)[:, None]
    p.mul_(w * (1 + 2 * opt.z_loss * lse[:, None]) if opt.z_loss else w)
    p.scatter_add_(1, targets.label[:, None], (opt.label_smoothing - 1) * w)
    if opt.label_smoothing:
        p.sub_(w * (opt.label_smoothing / p.shape[1]))
    if slope is not None:
        p.mul_(slope)
    if targets.ignored is not None:
        p.masked_fill_(targets.ignored[:, None], 0)
    if targets.invalid is not None:
        p.masked_fill_(targets.invalid[:, None], torch.nan)


def _blocks(logits: Tensor) -> Iterator[tuple[Tensor, slice]]:
    """Blocks [rows, V] of logits [..., V] of any strides, never copied, and where they lie among all rows."""
    rows = block_rows(logits.shape[-1], logits.dtype, logits.device)
    start = 0
    for matrix in _matrices(logits):
        for block in torch.split(matrix, rows):
            yield block, slice(start, start + len(block))
            start += len(block)


def _matrices(x: Tensor) -> list[Tensor]:
    """x [..., V] as a list of matrices, in order, without a copy."""
    try:
        return [x.view(-1, x.shape[-1])]
    except RuntimeError:  # these leading dimensions cannot be merged into one
        return [matrix for part in x for matrix in _matrices(part)]


def _block_buffer(logits: Tensor) -> Tensor:
    """Room for the softmax of any block of the logits."""
    vocab = logits.shape[-1]
    rows = min(block_rows(vocab, logits.dtype, logits.device), logits.numel() // vocab)
    return logits.new_empty((rows, vocab), dtype=accumulate_dtype(logits.dtype))


# Many blocks: logits [..., V] of N rows, everything else flat -------------------------------------------


def _forward(logits: Tensor, targets: Targets, metrics: bool, opt: Options) -> tuple[Tensor, ...]:
    """Losses, log-sum-exp and, with `metrics`, entropy and correctness: [N] each."""
    n = len(targets.label)
    buffer = _block_buffer(logits)
    nll, lse = buffer.new_empty(n), buffer.new_empty(n)
    entropy, correct = buffer.new_empty(n), targets.label.new_empty(n, dtype=torch.bool)
    for x, at in _blocks(logits):
        p, rows = buffer[: len(x)], targets.rows(at)
        if rows.none:
            nll[at] = lse[at] = 0
            continue
        z, _ = _activate(x, opt, p, want_slope=False)
        if metrics:
            correct[at] = z.argmax(-1) == rows.label
        nll[at], lse[at] = _losses(z, rows, opt, p)
        if metrics:
            entropy[at] = torch.special.entr(p).sum(-1)
    if not metrics:
        return nll, lse
    if targets.ignored is not None:
        entropy.masked_fill_(targets.ignored, 0)
        correct.masked_fill_(targets.ignored, False)
    return nll, lse, entropy, correct


def _backward(
    logits: Tensor, targets: Targets, lse: Tensor, grad_nll: Tensor, opt: Options, grad: Tensor
) -> None:
    """Writes the gradient by the logits to `grad` [N, V], of the logits' dtype; it may be the logits."""
    direct = grad.dtype == lse.dtype
    buffer = grad if direct else _block_buffer(logits)
    for x, at in _blocks(logits):
        rows = targets.rows(at)
        if rows.none:
            grad[at] = 0
            continue
        p = grad[at] if direct else buffer[: len(x)]
        z, slope = _activate(x, opt, p, want_slope=True)
        torch.softmax(z, -1, out=p)
        _to_gradient(p, lse[at], slope, rows, grad_nll[at], opt)
        if not direct:
            grad[at] = p


def _forward_backward(logits: Tensor, targets: Targets, opt: Options) -> Tensor:
    """Losses [N] of logits [N, V], which become the gradient of the sum of the losses."""
    buffer = _block_buffer(logits)
    nll, one = buffer.new_empty(len(logits)), buffer.new_ones(len(logits))
    for x, at in _blocks(logits):
        p = x if x.dtype == nll.dtype else buffer[: len(x)]
        z, slope = _activate(x, opt, p, want_slope=True)
        nll[at], lse = _losses(z, targets.rows(at), opt, p)
        _to_gradient(p, lse, slope, targets.rows(at), one[at], opt)
        if p is not x:
            x.copy_(p)
    return nll


# Logits path -------------------------------------------------------------------------------------------


def token_nll(logits: Tensor, labels: Tensor, metrics: bool, opt: Options) -> tuple[Tensor, ...]:
    targets = targets_of(labels, logits.shape[-1], opt.ignore_index)
    return tuple(t.view(labels.shape) for t in _forward(logits, targets, metrics, opt))


def token_nll_backward(grad_nll: Tensor, logits: Tensor, labels: Tensor, lse: Tensor, opt: Options) -> Tensor:
    targets = targets_of(labels, logits.shape[-1], opt.ignore_index)
    grad = in_huge_pages(logits.new_empty(logits.shape))
    _backward(logits, targets, lse.flatten(), grad_nll.flatten(), opt, grad.view(-1, logits.shape[-1]))
    return grad


# Linear path -------------------------------------------------------------------------------------------


class _Rows(NamedTuple):
    """The rows of a head that have a label, or all of them where it cannot look."""

    head: Head
    targets: Targets
    where: Tensor | None  # which rows of the head they are; None: all of them

    @classmethod
    def of(cls, head: Head, opt: Options) -> "_Rows":
        targets = targets_of(head.labels, len(head.weight), opt.ignore_index)
        if targets.ignored is None or not can_look(head.hidden):
            return cls(head, targets, None)
        where = (~targets.ignored).nonzero()[:, 0]
        return cls(head, Targets(targets.label[where], None, None), where)

    def gather(self, x: Tensor) -> Tensor:
        """These rows of x [N]."""
        return x if self.where is None else x[self.where]

    def scatter(self, x: Tensor) -> Tensor:
        """[N] with x in these rows, zeros elsewhere."""
        if self.where is None:
            return x
        return x.new_zeros(len(self.head.hidden)).index_copy_(0, self.where, x)

    def hidden(self, at: slice) -> Tensor:
        """Hidden states [rows, D] of these rows, zeros for a row without a label."""
        if self.where is not None:
            return self.head.hidden[self.where[at]]
        hidden, ignored = self.head.hidden[at], self.targets.ignored
        return hidden if ignored is None else hidden.masked_fill(ignored[at][:, None], 0)

    def chunks(self) -> Iterator[tuple[Tensor, Tensor, slice]]:
        """Logits [rows, V], always in the same memory, hidden states [rows, D], and which rows these are."""
        _, weight, bias, _ = self.head
        n, most = len(self.targets.label), chunk_rows(weight)
        rows = -(-n // max(-(-n // most), 1))  # as few chunks as that allows, all alike
        buffer = in_huge_pages(weight.new_empty((min(rows, n), len(weight))))
        for start in range(0, n, max(rows, 1)):
            at = slice(start, min(start + rows, n))
            hidden = self.hidden(at)
            out = buffer[: len(hidden)]
            if bias is None:
                torch.mm(hidden, weight.T, out=out)
            else:
                torch.addmm(bias, hidden, weight.T, out=out)
            yield out, hidden, at


class _Gradients:
    """Sums, over chunks, of the gradients of a head; empty tensors for those nobody needs."""

    def __init__(self, rows: _Rows, needs: Needs) -> None:
        self.rows, self.needs = rows, needs
        hidden, weight, *_ = rows.head
        wide = accumulate_dtype(weight.dtype)
        few = len(rows.targets.label) <= FEW_CHUNKS * chunk_rows(weight) and weight.dtype != torch.float16
        shape = weight.shape if needs.weight else (0,)
        self.hidden = hidden.new_zeros(hidden.shape if needs.hidden else 0)
        self.weight = in_huge_pages(weight.new_empty(shape, dtype=weight.dtype if few else wide)).zero_()
        self.bias = weight.new_zeros(len(weight) if needs.bias else 0, dtype=wide)

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        """By hidden, weight and bias, in their dtypes."""
        dtype = self.hidden.dtype
        return self.hidden, self.weight.to(dtype), self.bias.to(dtype)

    def add(self, grad: Tensor, hidden: Tensor, at: slice) -> None:
        """Adds what the gradient [rows, V] by the logits of hidden [rows, D], the rows `at`, brings."""
        if self.needs.hidden and self.rows.where is None:
            torch.mm(grad, self.rows.head.weight, out=self.hidden[at])
        elif self.needs.hidden and self.rows.where is not None:
            self.hidden.index_copy_(0, self.rows.where[at], grad @ self.rows.head.weight)
        if self.needs.weight:
            _add_product(self.weight, grad.T, hidden)
        if self.needs.bias:
            self.bias += grad.sum(0, dtype=self.bias.dtype)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, where the total may be of a wider dtype."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
        return
    for out, rows in zip(torch.split(total, 8192), torch.split(a, 8192), strict=True):
        out += rows @ b


def linear_token_nll(head: Head, metrics: bool, opt: Options) -> tuple[Tensor, ...]:
    rows = _Rows.of(head, opt)
    chunks = [_forward(x, rows.targets.rows(at), metrics, opt) for x, _, at in rows.chunks()]
    if not chunks:
        chunks = [_forward(head.weight.new_empty(0, len(head.weight)), rows.targets, metrics, opt)]
    return tuple(rows.scatter(torch.cat(parts)) for parts in zip(*chunks, strict=True))


def linear_token_nll_backward(
    grad_nll: Tensor, lse: Tensor, head: Head, needs: Needs, opt: Options
) -> tuple[Tensor, ...]:
    rows = _Rows.of(head, opt)
    lse, grad_nll = rows.gather(lse), rows.gather(grad_nll)
    grads = _Gradients(rows, needs)
    for x, h, at in rows.chunks():
        _backward(x, rows.targets.rows(at), lse[at], grad_nll[at], opt, grad=x)
        grads.add(x, h, at)
    return grads.result()


def linear_unit_gradients(head: Head, needs: Needs, opt: Options) -> tuple[Tensor, ...]:
    rows = _Rows.of(head, opt)
    grads = _Gradients(rows, needs)
    nll = grads.bias.new_empty(len(rows.targets.label))
    for x, h, at in rows.chunks():
        nll[at] = _forward_backward(x, rows.targets.rows(at), opt)
        grads.add(x, h, at)
    return rows.scatter(nll), *grads.result()


def linear_row_gradient(row: Head, opt: Options) -> Tensor:
    hidden, weight, bias, labels = row
    logits = torch.nn.functional.linear(hidden, weight, bias)
    _forward_backward(logits, targets_of(labels, len(weight), opt.ignore_index), opt)
    return logits
