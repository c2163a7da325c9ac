"""A vocabulary in parts: each rank has the logits, or the rows of the weight, for some of the classes.

A softmax over all parts needs the largest z and Σ exp(z − largest) of each row from every part; the loss
needs the z of the label, which one part has. So the ranks exchange a few numbers a row and no logits:

    forward    three all-reduces: the sizes of the parts, in a first exchange of 38·W numbers; the largest z,
               N; sums, 2N (3N with label smoothing, and N or 2N more with metrics); with metrics a fourth:
               where the largest z is, N
    backward   none for the logits; one for the gradient of hidden, unless the caller does that

The rest is the engine itself, part by part. Labels and hidden states must be the same on all ranks; then the
losses are too.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nvamp.engine import ops, reference
from nvamp.engine.checks import check_class_weight, check_label_range
from nvamp.engine.options import Head, Options, weights_of
from nvamp.ranks import Ranks

IGNORED, ELSEWHERE = -100, -1


def has_dtensors(*tensors: Tensor | None) -> bool:
    """Whether one of them is a `DTensor`. PyTorch can be built without that type."""
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
    weights: Tensor | None  # [..., 2], those of `weights_of`
    class_weight: Tensor | None  # [size]: of the classes of this part

    @classmethod
    def of(cls, labels: Tensor, size: int, opt: Options, ranks: Ranks) -> "_Targets":
        """The labels as this rank sees them; its part has `size` classes."""
        sizes = ranks.gather(torch.full((1,), size, device=labels.device))[:, 0]
        start, classes = sizes[: ranks.rank].sum(), sizes.sum()
        if not torch.compiler.is_compiling():
            check_label_range(labels, classes, opt.ignore_index)
        ignored = labels == opt.ignore_index
        local = labels.long() - start
        local = torch.where((local >= 0) & (local < size), local, ELSEWHERE)
        invalid = ~ignored & ((labels < 0) | (labels >= classes))
        local = torch.where(ignored, IGNORED, local)
        weights, class_weight = weights_of(labels, opt), opt.class_weight
        if class_weight is not None:
            check_class_weight(class_weight, classes)
            class_weight = class_weight[start + torch.arange(size, device=labels.device)]
        return cls(local, ignored, invalid, size, start, classes, weights, class_weight)

    def local(self, opt: Options) -> Options:
        """The options of this part."""
        return opt._replace(ignore_index=IGNORED, class_weight=self.class_weight)


def token_nll(
    logits: Tensor,
    labels: Tensor,
    metrics: int,
    inplace_backward: bool,
    backend: str,
    opt: Options,
    ranks: Ranks,
) -> tuple[Tensor, ...]:
    """The results of `reference.token_nll`, [...] each, for the whole vocabulary.

    The labels [...] index the whole vocabulary; the logits [..., classes] belong to this part.
    """
    targets = _Targets.of(labels, logits.shape[-1], opt, ranks)
    local = targets.local(opt)
    if backend == "reference":
        return _reference(logits, targets, metrics, opt, ranks)
    statistics = ops.part_statistics(logits.detach(), targets.labels, metrics, backend, local)
    whole, others = _put_together(_Statistics(*statistics), targets, metrics, opt, ranks)
    nll, entropy = ops.part_nll(logits, targets.labels, whole, inplace_backward, backend, local)
    return _results(nll, whole.norm, entropy, others)


def linear_token_nll(
    head: Head, metrics: int, accum_dtype: torch.dtype | None, backend: str, opt: Options, ranks: Ranks
) -> tuple[Tensor, ...]:
    """The same for N hidden states, from this part's rows of the weight.

    The gradient with respect to hidden covers this part only.
    """
    targets = _Targets.of(head.labels, len(head.weight), opt, ranks)
    head = head._replace(labels=targets.labels)
    local = targets.local(opt)
    if backend == "reference":
        return _reference(reference.logits_of(head, IGNORED), targets, metrics, opt, ranks)
    fixed = Head(*(None if t is None else t.detach() for t in head))  # type: ignore[arg-type]
    statistics = ops.linear_part_statistics(fixed, metrics, accum_dtype, backend, local)
    whole, others = _put_together(_Statistics(*statistics), targets, metrics, opt, ranks)
    nll, entropy = ops.linear_part_nll(head, whole, accum_dtype, backend, local)
    return _results(nll, whole.norm, entropy, others)


def _reference(
    logits: Tensor, targets: _Targets, metrics: int, opt: Options, ranks: Ranks
) -> tuple[Tensor, ...]:
    """The same for autograd to differentiate: each rank's addend to a sum gets the gradient of the sum."""
    statistics = _Statistics(*reference.part_statistics(logits, targets.labels, targets.local(opt)))
    through = ranks._replace(total=lambda x: _Sum.apply(x, ranks))  # type: ignore[no-untyped-call]
    whole, others = _put_together(statistics, targets, metrics, opt, through)
    return _results(whole.nll, whole.norm, whole.entropy, others)


def _results(
    nll: Tensor, norm: Tensor, entropy: Tensor | None, others: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    return (nll, norm.detach().sum(-1), entropy, *others) if others and entropy is not None else (nll,)


def take_part(labels: Tensor, dtype: torch.dtype, metrics: int, opt: Options, ranks: Ranks) -> None:
    """Makes the exchanges of a rank that has nothing to give, with NaN in place of its statistics."""
    none = torch.zeros(1, dtype=torch.int64, device=labels.device)
    ranks.gather(none)
    nll = torch.full(labels.shape, torch.nan, dtype=dtype, device=labels.device)
    nobody = torch.zeros_like(nll, dtype=torch.bool)
    targets = _Targets(labels, nobody, nobody, 0, none[0], none[0], weights_of(labels, opt), None)
    statistics = _Statistics(torch.stack((nll, nll), -1), nll, nll, nll, torch.zeros_like(labels), nll)
    _put_together(statistics, targets, metrics, opt, ranks)


class _Statistics(NamedTuple):
    """The results of `Backend.part_statistics`; metrics that are not wanted mean nothing."""

    norm: Tensor  # [..., 2]
    at_label: Tensor  # [...], like all that follow
    sum_below: Tensor
    entropy: Tensor
    prediction: Tensor
    all_below: Tensor


def _put_together(
    s: _Statistics, targets: _Targets, metrics: int, opt: Options, ranks: Ranks
) -> tuple[ops.Whole, tuple[Tensor, ...]]:
    """Combines the statistics of all parts. It also returns the metrics without gradient that are wanted."""
    top, total = s.norm.unbind(-1)
    largest = ranks.maximum(top)
    lower = torch.where(top == -torch.inf, 0, largest - top)  # how far this part's largest z is below it
    mass = (top - largest).exp() * total
    sums = [mass, s.at_label]
    if opt.label_smoothing:
        # Σ (largest − z) over all classes: the common part of all z would cost digits.
        size = targets.size if targets.class_weight is None else targets.class_weight.sum()
        sums.append(s.sum_below + size * lower)
    if metrics > 2:
        sums.append(s.all_below + targets.size * lower)
    if metrics:
        # The entropy of the whole is log_sum plus, over parts, share · (entropy − log of the part's mass).
        some = torch.where(total == 0, 1, total)
        sums.append(mass * (torch.where(total == 0, 0, s.entropy) + (lower - some.log())))
    total, at_label, *rest = ranks.total(torch.stack(sums))
    log_sum = total.log()
    below, of_lse = largest - at_label, log_sum
    if opt.z_loss:
        of_lse = of_lse + opt.z_loss * (largest + log_sum).square()
    if targets.weights is not None:
        below, of_lse = below * targets.weights[..., 0], of_lse * targets.weights[..., 1]
    elif opt.label_smoothing:
        below = below * (1 - opt.label_smoothing)
    if opt.label_smoothing:
        # Both may be inf, so `torch.lerp`, which takes their difference, would give NaN.
        below = below + opt.label_smoothing * (rest[0] / targets.classes)
    nll = below + of_lse
    nll = nll.masked_fill(targets.ignored, 0).masked_fill(targets.invalid, torch.nan)
    norm = torch.stack((largest, log_sum), -1).masked_fill(targets.invalid[..., None], torch.nan)
    if not metrics:
        return ops.Whole(norm, nll, targets.classes, targets.weights, None), ()
    entropy = (log_sum + rest[-1] / total).masked_fill(targets.ignored, 0)
    others = [_first_of_largest(s.prediction, top == largest, targets, ranks)]
    if metrics > 2:
        others.append((largest - rest[-2].detach() / targets.classes).masked_fill(targets.ignored, 0))
    return ops.Whole(norm, nll, targets.classes, targets.weights, entropy), tuple(others)


def _first_of_largest(prediction: Tensor, has_largest: Tensor, targets: _Targets, ranks: Ranks) -> Tensor:
    """The class of the largest z over all parts, the first of equals, from each part's own prediction."""
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
