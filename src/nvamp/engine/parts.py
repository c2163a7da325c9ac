"""A vocabulary in parts, one on each rank: the logits, or the rows of the weight, of its classes.

A softmax over all parts needs of each row the largest z and Σ exp(z − largest) of every part, its loss the z
of the label, which one part has. So the ranks exchange a few numbers a row and no logits:

    forward    three all-reduces: the sizes of the parts, W numbers; the largest z, N; sums, 2N (3N with
               label smoothing)
    backward   none by logits; one of the gradient by hidden, unless the caller does that

Everything else is the engine's own, part by part. What the ranks have in common, labels and hidden states, is
to be the same on all of them; then so are the losses.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nvamp.engine import ops, reference
from nvamp.engine.checks import check_label_range
from nvamp.engine.options import Head, Options
from nvamp.ranks import Ranks

IGNORED, ELSEWHERE = -100, -1


def has_dtensors(*tensors: Tensor | None) -> bool:
    """Whether one of them is a `DTensor`, which PyTorch need not have."""
    plain = all(x is None or type(x) in (Tensor, nn.Parameter) for x in tensors)
    if plain or not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return any(isinstance(x, DTensor) for x in tensors)


class _Targets(NamedTuple):
    """Labels [...], as a part of the vocabulary sees them."""

    labels: Tensor  # int64: in [0, classes of this part), IGNORED, or ELSEWHERE
    ignored: Tensor  # bool
    invalid: Tensor  # bool: in no part
    size: int  # classes of this part
    classes: Tensor  # int64 []: of all parts

    @classmethod
    def of(cls, labels: Tensor, size: int, opt: Options, ranks: Ranks) -> "_Targets":
        """For the part of this rank, which has `size` classes."""
        sizes = ranks.gather(torch.full((1,), size, device=labels.device))[:, 0]
        start, classes = sizes[: ranks.rank].sum(), sizes.sum()
        if not torch.compiler.is_compiling():
            check_label_range(labels, classes, opt.ignore_index)
        ignored = labels == opt.ignore_index
        local = labels.long() - start
        local = torch.where((local >= 0) & (local < size), local, ELSEWHERE)
        invalid = ~ignored & ((labels < 0) | (labels >= classes))
        return cls(torch.where(ignored, IGNORED, local), ignored, invalid, size, classes)


def token_nll(
    logits: Tensor, labels: Tensor, inplace_backward: bool, backend: str, opt: Options, ranks: Ranks
) -> Tensor:
    """Losses [...] of labels [...] from the logits [..., classes of this part]."""
    targets = _Targets.of(labels, logits.shape[-1], opt, ranks)
    if backend == "reference":
        return _reference_nll(logits, targets, opt, ranks)
    local = opt._replace(ignore_index=IGNORED)
    norm, at_label, sum_below = ops.part_statistics(logits.detach(), targets.labels, backend, local)
    nll, norm = _put_together(norm, at_label, sum_below, targets, opt, ranks)
    whole = ops.Whole(norm, nll, targets.classes)
    result: Tensor = ops.part_nll(logits, targets.labels, whole, inplace_backward, backend, local)
    return result


def linear_token_nll(
    head: Head, accum_dtype: torch.dtype | None, backend: str, opt: Options, ranks: Ranks
) -> Tensor:
    """Losses [N] from the rows of the weight of this part; by hidden the gradient is that of this part."""
    targets = _Targets.of(head.labels, len(head.weight), opt, ranks)
    head = head._replace(labels=targets.labels)
    if backend == "reference":
        return _reference_nll(reference.logits_of(head, IGNORED), targets, opt, ranks)
    local = opt._replace(ignore_index=IGNORED)
    fixed = Head(*(None if t is None else t.detach() for t in head))  # type: ignore[arg-type]
    norm, at_label, sum_below = ops.linear_part_statistics(fixed, accum_dtype, backend, local)
    nll, norm = _put_together(norm, at_label, sum_below, targets, opt, ranks)
    whole = ops.Whole(norm, nll, targets.classes)
    result: Tensor = ops.linear_part_nll(head, whole, accum_dtype, backend, local)
    return result


def _reference_nll(logits: Tensor, targets: _Targets, opt: Options, ranks: Ranks) -> Tensor:
    """For autograd to differentiate: what a rank adds to a sum of all has the gradient of that sum."""
    local = opt._replace(ignore_index=IGNORED)
    statistics = reference.part_statistics(logits, targets.labels, local)
    through = ranks._replace(total=lambda x: _Sum.apply(x, ranks))  # type: ignore[no-untyped-call]
    return _put_together(*statistics, targets, opt, through)[0]


def _put_together(
    norm: Tensor, at_label: Tensor, sum_below: Tensor, targets: _Targets, opt: Options, ranks: Ranks
) -> tuple[Tensor, Tensor]:
    """Losses and norm of the whole vocabulary from the statistics of this part."""
    top, total = norm.unbind(-1)
    largest = ranks.maximum(top)
    sums = [(top - largest).exp() * total, at_label]
    if opt.label_smoothing:
        # Σ (largest − z) over all classes: what they have in common is not added up.
        sums.append(sum_below + targets.size * torch.where(top == -torch.inf, 0, largest - top))
    total, at_label, *rest = ranks.total(torch.stack(sums))
    log_sum = total.log()
    nll = (largest - at_label) + log_sum
    if opt.label_smoothing:
        # Both may be inf: no difference of the two, as `torch.lerp` would take it.
        uniform = rest[0] / targets.classes + log_sum
        nll = (1 - opt.label_smoothing) * nll + opt.label_smoothing * uniform
    if opt.z_loss:
        nll = nll + opt.z_loss * (largest + log_sum).square()
    nll = nll.masked_fill(targets.ignored, 0).masked_fill(targets.invalid, torch.nan)
    norm = torch.stack((largest, log_sum), -1)
    return nll, norm.masked_fill(targets.invalid[..., None], torch.nan)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks) -> Tensor:
        return ranks.total(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
