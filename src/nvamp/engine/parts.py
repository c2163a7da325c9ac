"""A vocabulary in parts, one on each rank: the logits, or the rows of the weight, of its classes.

A softmax over all parts needs of each row the largest z and Σ exp(z − largest) of every part, its loss the z
of the label, which one part has. So the ranks exchange a few numbers a row and no logits:

    forward    three all-reduces: the sizes of the parts, W numbers; the largest z, N; sums, 2N (3N with
               label smoothing, and N more with metrics); with metrics a fourth: where the largest z is, N
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
    start: Tensor  # int64 []: classes of the parts before it
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
        return cls(torch.where(ignored, IGNORED, local), ignored, invalid, size, start, classes)


def token_nll(
    logits: Tensor,
    labels: Tensor,
    metrics: bool,
    inplace_backward: bool,
    backend: str,
    opt: Options,
    ranks: Ranks,
) -> tuple[Tensor, ...]:
    """(nll,) or, with `metrics`, (nll, lse, entropy, prediction), [...] each, of the whole vocabulary.

    labels [...] are of all of it too, the logits [..., classes] are those of this part.
    """
    targets = _Targets.of(labels, logits.shape[-1], opt, ranks)
    local = opt._replace(ignore_index=IGNORED)
    if backend == "reference":
        return _reference(logits, targets, metrics, opt, ranks)
    statistics = ops.part_statistics(logits.detach(), targets.labels, metrics, backend, local)
    whole, prediction = _put_together(_Statistics(*statistics), targets, metrics, opt, ranks)
    nll, entropy = ops.part_nll(logits, targets.labels, whole, inplace_backward, backend, local)
    return _results(nll, whole.norm, entropy, prediction)


def linear_token_nll(
    head: Head, metrics: bool, accum_dtype: torch.dtype | None, backend: str, opt: Options, ranks: Ranks
) -> tuple[Tensor, ...]:
    """The same of N rows from the rows of the weight of this part.

    The gradient with respect to hidden is that of this part.
    """
    targets = _Targets.of(head.labels, len(head.weight), opt, ranks)
    head = head._replace(labels=targets.labels)
    local = opt._replace(ignore_index=IGNORED)
    if backend == "reference":
        return _reference(reference.logits_of(head, IGNORED), targets, metrics, opt, ranks)
    fixed = Head(*(None if t is None else t.detach() for t in head))  # type: ignore[arg-type]
    statistics = ops.linear_part_statistics(fixed, metrics, accum_dtype, backend, local)
    whole, prediction = _put_together(_Statistics(*statistics), targets, metrics, opt, ranks)
    nll, entropy = ops.linear_part_nll(head, whole, accum_dtype, backend, local)
    return _results(nll, whole.norm, entropy, prediction)


def _reference(
    logits: Tensor, targets: _Targets, metrics: bool, opt: Options, ranks: Ranks
) -> tuple[Tensor, ...]:
    """For autograd to differentiate: what a rank adds to a sum of all has the gradient of that sum."""
    local = opt._replace(ignore_index=IGNORED)
    statistics = _Statistics(*reference.part_statistics(logits, targets.labels, local))
    through = ranks._replace(total=lambda x: _Sum.apply(x, ranks))  # type: ignore[no-untyped-call]
    whole, prediction = _put_together(statistics, targets, metrics, opt, through)
    return _results(whole.nll, whole.norm, whole.entropy, prediction)


def _results(
    nll: Tensor, norm: Tensor, entropy: Tensor | None, prediction: Tensor | None
) -> tuple[Tensor, ...]:
    if entropy is None or prediction is None:
        return (nll,)
    return nll, norm.detach().sum(-1), entropy, prediction


class _Statistics(NamedTuple):
    """Those of `Backend.part_statistics`; the last two mean nothing without metrics."""

    norm: Tensor  # [..., 2]
    at_label: Tensor  # [...], and so are the next
    sum_below: Tensor
    entropy: Tensor
    prediction: Tensor


def _put_together(
    s: _Statistics, targets: _Targets, metrics: bool, opt: Options, ranks: Ranks
) -> tuple[ops.Whole, Tensor | None]:
    """What is true of the whole vocabulary, from that of this part; with `metrics` the prediction too."""
    top, total = s.norm.unbind(-1)
    largest = ranks.maximum(top)
    lower = torch.where(top == -torch.inf, 0, largest - top)  # by so much is this part's largest z
    mass = (top - largest).exp() * total
    sums = [mass, s.at_label]
    if opt.label_smoothing:
        # Σ (largest − z) over all classes: what they have in common is not added up.
        sums.append(s.sum_below + targets.size * lower)
    if metrics:
        # Entropy of the whole: its log_sum, and the share of each part times (its entropy − log of its mass).
        some = torch.where(total == 0, 1, total)
        sums.append(mass * (torch.where(total == 0, 0, s.entropy) + (lower - some.log())))
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
    norm = torch.stack((largest, log_sum), -1).masked_fill(targets.invalid[..., None], torch.nan)
    if not metrics:
        return ops.Whole(norm, nll, targets.classes, None), None
    entropy = (log_sum + rest[-1] / total).masked_fill(targets.ignored, 0)
    prediction = _first_of_largest(s.prediction, top == largest, targets, ranks)
    return ops.Whole(norm, nll, targets.classes, entropy), prediction


def _first_of_largest(prediction: Tensor, has_largest: Tensor, targets: _Targets, ranks: Ranks) -> Tensor:
    """The class of the largest z of all parts, the first of equals, from that of this part."""
    none = targets.classes  # comes after every class
    mine = torch.where(has_largest, targets.start + prediction, none) if targets.size else none
    first = -ranks.maximum(-mine.expand(prediction.shape))
    return first.clamp(max=targets.classes - 1).masked_fill(targets.ignored, 0)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks) -> Tensor:
        return ranks.total(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
