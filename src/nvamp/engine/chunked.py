"""Backend `chunked`: plain PyTorch on any device, one block of rows at a time.

A block is small enough to stay in the caches of a CPU while several operations pass over it, and large enough
to fill a GPU. The backward recomputes the softmax; nothing else of the size of the logits is kept.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from nvamp.engine import devices
from nvamp.engine.backend import Chunk, Largest, OfEntropy
from nvamp.engine.options import Options, accumulate_dtype, weights_of

MiB = 2**20


def block_rows(vocab: int, dtype: torch.dtype, device: torch.device) -> int:
    """Rows of a block. Its softmax then takes 2 MiB a thread on a CPU, and 256 MiB elsewhere."""
    threads, room = (torch.get_num_threads(), 2 * MiB) if device.type == "cpu" else (256, MiB)
    return max(threads * room // (vocab * accumulate_dtype(dtype).itemsize), threads)


# Labels ------------------------------------------------------------------------------------------------


class Targets(NamedTuple):
    """Labels [tokens] that are safe to gather with, and which of them had to be replaced, and why."""

    label: Tensor  # int64 in [0, V); 0 for a replaced one
    ignored: Tensor | None  # bool; None if known to be all False
    invalid: Tensor | None  # bool; None if known to be all False

    def rows(self, where: slice) -> "Targets":
        return Targets(*(None if t is None else t[where] for t in self))  # type: ignore[arg-type]

    @property
    def none(self) -> bool:
        """Whether no row has a label, as in a masked prompt. False if a check would wait for the device."""
        return self.ignored is not None and devices.can_look(self.ignored) and bool(self.ignored.all())


def targets_of(labels: Tensor, vocab: int, opt: Options, part: bool = False) -> Targets:
    """`Targets` of labels [...], flattened.

    For a `part` of the vocabulary the invalid labels are those of other parts. Otherwise a CPU has none:
    labels out of range were refused before.
    """
    labels = labels.flatten().long()
    ignored = labels == opt.ignore_index
    if devices.can_look(labels) and not part:
        return Targets(labels.masked_fill(ignored, 0), ignored if ignored.any() else None, None)
    invalid = ~ignored & ((labels < 0) | (labels >= vocab))
    return Targets(labels.masked_fill(ignored | invalid, 0), ignored, invalid)


# One block ---------------------------------------------------------------------------------------------


def _activate(x: Tensor, opt: Options, out: Tensor, want_slope: bool) -> tuple[Tensor, Tensor | None]:
    """z of a block [rows, V] of logits x, and with `softcap` dz/dx (without the scale) if wanted.

    z is x itself if nothing changes it, else `out`.
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


def _losses(
    z: Tensor, targets: Targets, weights: Tensor | None, opt: Options, out: Tensor
) -> tuple[Tensor, Tensor]:
    """Losses [rows] and norm [rows, 2] of a block z [rows, V]. `out`, which may be z, gets softmax(z)."""
    top = z.amax(-1)
    below_top = top - z.gather(1, targets.label[:, None])[:, 0]
    if opt.label_smoothing or weights is not None:
        below_top *= 1 - opt.label_smoothing if weights is None else weights[:, 0]
    if opt.label_smoothing:
        z = torch.sub(z, top[:, None], out=out)  # the common part of all z would cost the mean digits
        # Both may be inf, so `torch.lerp`, which takes their difference, would give NaN.
        below_top -= opt.label_smoothing * _mean(z, opt)
    # The largest probability is 1 / Σ exp(z − top).
    log_sum = -torch.softmax(z, -1, out=out).amax(-1).log_()
    of_lse = log_sum + opt.z_loss * (top + log_sum).square() if opt.z_loss else log_sum
    nll = below_top + (of_lse if weights is None else weights[:, 1] * of_lse)
    if targets.ignored is not None:
        nll.masked_fill_(targets.ignored, 0)
    if targets.invalid is not None:
        nll.masked_fill_(targets.invalid, torch.nan)
    return nll, torch.stack((top, log_sum), -1)


def _mean(x: Tensor, opt: Options) -> Tensor:
    """The mean [rows] of x [rows, V] over the classes, each with its weight if they have some."""
    return x.mean(-1) if opt.class_weight is None else x @ opt.class_weight / x.shape[1]


def _weighted(below: Tensor, p: Tensor) -> Tensor:
    """Σ p·(z − largest z) [rows] of a block; overwrites `below`, which is z − largest z."""
    return _without_inf(below).mul_(p).sum(-1)


def _without_inf(below: Tensor) -> Tensor:
    """z − largest z in place, with −10⁴ for anything less: exp is 0 there, and 0 times −inf would be NaN."""
    return below.clamp_(min=-1e4)


def _to_gradient(
    p: Tensor,
    norm: Tensor,
    slope: Tensor | None,
    targets: Targets,
    grad_nll: Tensor | None,
    weights: Tensor | None,
    opt: Options,
    classes: Tensor | None = None,
    of_entropy: OfEntropy | None = None,
    below: Tensor | None = None,
) -> None:
    """Turns the softmax p [rows, V] of a block, in place, into the gradient of Σ grad_nll·nll.

    The gradient is with respect to the logits of the block. A `grad_nll` of None counts as ones. With
    `classes` the block is a part of a vocabulary of that size. `of_entropy` adds the gradient of
    Σ grad·entropy and overwrites `below`, z − largest z [rows, V].
    """
    # dnll/dz = p·(1 + 2·z_loss·lse) − (1 − label_smoothing)·[v = y] − label_smoothing/V
    # With class weights the first and the second term have those of the target, the third that of v.
    # Without the label's part p is the gradient already, if it has no weight of any kind.
    weighted = grad_nll is not None or opt.logit_scale != 1 or weights is not None or opt.z_loss
    w = p.new_full((len(p),), opt.logit_scale) if grad_nll is None else grad_nll * opt.logit_scale
    w = w[:, None]
    factor = w if weights is None else w * weights[:, 1:]
    if opt.z_loss:
        factor = factor * (1 + 2 * opt.z_loss * norm.sum(-1, keepdim=True))
    if of_entropy is not None and below is not None:
        # dentropy/dz = −p·(log p + entropy), and log p = below − log_sum
        h = (of_entropy.grad * -opt.logit_scale)[:, None]
        factor = factor + h * (of_entropy.entropy - norm[:, 1])[:, None]
        factor = torch.addcmul(factor, h, _without_inf(below), out=below)
    if weighted:
        p.mul_(factor)
    at_label = -w * (1 - opt.label_smoothing if weights is None else weights[:, :1])
    if classes is not None and targets.invalid is not None:
        at_label = at_label.masked_fill(targets.invalid[:, None], 0)
    p.scatter_add_(1, targets.label[:, None], at_label)
    if opt.label_smoothing:
        uniform = w * opt.label_smoothing / (p.shape[1] if classes is None else classes)
        if opt.class_weight is None:
            p.sub_(uniform)
        else:
            p.addr_(uniform[:, 0], opt.class_weight, alpha=-1)
    if slope is not None:
        p.mul_(slope)
    if targets.ignored is not None:
        p.masked_fill_(targets.ignored[:, None], 0)
    if targets.invalid is not None and classes is None:
        p.masked_fill_(targets.invalid[:, None], torch.nan)


def _blocks(logits: Tensor) -> Iterator[tuple[Tensor, slice]]:
    """Blocks [rows, V] of logits [..., V] of any strides, never copied, and the slice of rows of each."""
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


# The backend: logits [..., V] of N rows ----------------------------------------------------------------


def token_nll(logits: Tensor, labels: Tensor, metrics: int, opt: Options) -> tuple[Tensor, ...]:
    targets = targets_of(labels, logits.shape[-1], opt)
    weights = weights_of(targets.label, opt)
    n = labels.numel()
    buffer = _block_buffer(logits)
    nll, norm = buffer.new_empty(n), buffer.new_empty(n, 2)
    entropy, prediction, mean = buffer.new_empty(n), targets.label.new_empty(n), buffer.new_empty(n)
    room = torch.empty_like(buffer) if metrics else buffer
    for x, at in _blocks(logits):
        p, rows = buffer[: len(x)], targets.rows(at)
        if rows.none:
            nll[at] = norm[at] = 0
            continue
        z, _ = _activate(x, opt, p, want_slope=False)
        if metrics:
            top, prediction[at] = z.max(-1)
            below = torch.sub(z, top[:, None], out=room[: len(x)])
        if metrics > 2:
            mean[at] = top + below.mean(-1)
        nll[at], norm[at] = _losses(z, rows, None if weights is None else weights[at], opt, p)
        if metrics:
            # Σ p is 1 up to rounding; uncorrected, that would cost the entropy and its gradient digits.
            total = p.sum(-1)
            norm[at, 1] += total - 1
            entropy[at] = norm[at, 1] - _weighted(below, p) / total
    found = (entropy, prediction, mean)[:metrics]
    if targets.ignored is not None:
        for x in found:
            x.masked_fill_(targets.ignored, 0)
    return nll.view(labels.shape), norm.view(*labels.shape, 2), *(x.view(labels.shape) for x in found)


def part_statistics(logits: Tensor, labels: Tensor, metrics: int, opt: Options) -> tuple[Tensor, ...]:
    targets = targets_of(labels, logits.shape[-1], opt, part=True)
    n = labels.numel()
    buffer = _block_buffer(logits)
    norm, at_label, sum_below = buffer.new_empty(n, 2), buffer.new_empty(n), buffer.new_zeros(n)
    entropy, prediction, all_below = buffer.new_empty(n), targets.label.new_empty(n), buffer.new_empty(n)
    second = torch.empty_like(buffer) if metrics else buffer
    for x, at in _blocks(logits):
        room = buffer[: len(x)]
        z, _ = _activate(x, opt, room, want_slope=False)
        at_label[at] = z.gather(1, targets.label[at][:, None])[:, 0]
        top = z.amax(-1)
        below = torch.sub(z, torch.where(top == -torch.inf, 0, top)[:, None], out=room)
        if opt.label_smoothing:
            sum_below[at] = -_mean(below, opt) * below.shape[1]
        if metrics:
            prediction[at] = z.argmax(-1)
        if metrics > 2:
            all_below[at] = -below.sum(-1)
        e = torch.exp(below, out=second[: len(x)])
        norm[at] = torch.stack((top, e.sum(-1)), -1)
        if metrics:
            total = norm[at, 1]
            entropy[at] = total.log() - _weighted(below, e) / total
    if targets.invalid is not None:
        at_label.masked_fill_(targets.invalid, 0)
    if targets.ignored is not None:
        for x in (norm, at_label, sum_below, entropy, prediction, all_below):
            x[targets.ignored] = 0
    found = at_label, sum_below, *(entropy, prediction, all_below)[:metrics]
    return norm.view(*labels.shape, 2), *(x.view(labels.shape) for x in found)


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
    targets = targets_of(labels, logits.shape[-1], opt, part=classes is not None)
    weights = weights_of(targets.label, opt) if weights is None else weights.view(-1, 2)
    grad_nll, norm = grad_nll.flatten(), norm.view(-1, 2)
    direct = out.dtype == norm.dtype
    buffer = out if direct else _block_buffer(logits)
    room = None if of_entropy is None else _block_buffer(logits)
    for x, at in _blocks(logits):
        grad = x if out is logits else out.view(-1, x.shape[-1])[at]
        rows = targets.rows(at)
        if rows.none:
            grad.zero_()
            continue
        p = grad if direct else buffer[: len(x)]
        z, slope = _activate(x, opt, p, want_slope=True)
        below = None if room is None else torch.sub(z, norm[at, :1], out=room[: len(x)])
        if classes is None:
            torch.softmax(z, -1, out=p)
        else:
            torch.sub(z, norm[at, :1], out=p).sub_(norm[at, 1:]).exp_()
        of_rows = None if of_entropy is None else OfEntropy(*(t.flatten()[at] for t in of_entropy))
        weigh = None if weights is None else weights[at]
        _to_gradient(p, norm[at], slope, rows, grad_nll[at], weigh, opt, classes, of_rows, below)
        if not direct:
            grad.copy_(p)


def unit_gradient_(logits: Tensor, labels: Tensor, opt: Options) -> Tensor:
    return unit_gradient(logits, labels, opt, out=logits)


def unit_gradient(logits: Tensor, labels: Tensor, opt: Options, out: Tensor) -> Tensor:
    """`Backend.unit_gradient_` that writes the gradient to `out`, of any dtype; losses [N]."""
    targets = targets_of(labels, logits.shape[-1], opt)
    weights = weights_of(targets.label, opt)
    n = labels.numel()
    direct = out.dtype == accumulate_dtype(logits.dtype)
    buffer = out if direct else _block_buffer(logits)
    nll = torch.empty(n, dtype=buffer.dtype, device=buffer.device)
    for x, at in _blocks(logits):
        grad = x if out is logits else out.view(-1, x.shape[-1])[at]
        p = grad if direct else buffer[: len(x)]
        z, slope = _activate(x, opt, p, want_slope=True)
        rows, weigh = targets.rows(at), None if weights is None else weights[at]
        nll[at], norm = _losses(z, rows, weigh, opt, p)
        _to_gradient(p, norm, slope, rows, None, weigh, opt)
        if not direct:
            grad.copy_(p)
    return nll


def keep_largest(largest: Largest, chunk: Chunk, opt: Options) -> None:
    i = chunk.number
    before, after = slice(i, i + 1), slice(i + 1, i + 2)
    losses = chunk.nll.masked_fill(chunk.labels == opt.ignore_index, -torch.inf)
    row = losses.argmax()[None]
    loss, best = losses[row], largest.loss[before]
    better = loss > best  # NaN is in the gradient of the sum already
    torch.where(better, loss, best, out=largest.loss[after])
    torch.where(better, row + chunk.start, largest.row[before], out=largest.row[after])
    torch.where(better, chunk.grad[row][0], largest.grad, out=largest.grad)
    torch.where(better, chunk.hidden[row][0], largest.hidden, out=largest.hidden)


def scale_and_add(x: Tensor, a: Tensor, b: Tensor | None, u: Tensor, v: Tensor, out: Tensor) -> None:
    if b is not None and devices.can_look(x) and x.dtype == out.dtype:
        torch.addmm(x, u[:, None], v[None], beta=float(a), alpha=float(b), out=out)
        return
    torch.mul(x, a, out=out)
    if b is not None:
        out.addmm_((b * u)[:, None].to(out.dtype), v[None])
