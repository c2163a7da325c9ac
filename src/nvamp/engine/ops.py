"""The engine's operators, through which autograd, a compiler and an exporter see the backends.

nvamp::token_nll             losses from logits; the backward recomputes the softmax
nvamp::linear_token_nll      losses from hidden states; the backward recomputes the logits too: four
                             matrix products, and any weights
nvamp::linear_nll_sum        the losses and their sum from hidden states, in three products: the gradient
                             of the sum is made while each chunk of logits is there; the backward scales
                             it and adds the gradients of the few losses that weigh more

The first two have counterparts for a vocabulary in parts, one on each rank. `nvamp.engine.parts` combines the
parts in between.

nvamp::part_statistics, nvamp::linear_part_statistics    what the losses follow from, for one part
nvamp::part_nll, nvamp::linear_part_nll                  the losses, and their gradients for that part
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from nvamp.engine import chunked, devices, linear
from nvamp.engine.backend import OfEntropy
from nvamp.engine.backends import load
from nvamp.engine.checks import check_label_range
from nvamp.engine.hugepages import in_huge_pages
from nvamp.engine.inplace import is_of_leaf, may_use_up, no_overlap, saving_is_hooked
from nvamp.engine.linear import Units
from nvamp.engine.operator import fields_of, is_plain, operator
from nvamp.engine.options import Head, Needs, Options, accumulate_dtype

Tensors = tuple[Tensor, ...]

_OPTIONS = f"str backend, {fields_of(Options)}"  # the last arguments of every operator that looks at logits
_HEAD = fields_of(Head)
_NEEDS = fields_of(Needs, prefix="needs_")
_METRICS = "Tensor entropy, Tensor prediction, Tensor mean"  # those not wanted are empty
_TOKENS = f"(Tensor nll, Tensor norm, {_METRICS})"
_OF_PART = "Tensor? classes, Tensor? weights"  # as in `Backend.token_nll_backward`
_OF_ENTROPY = "Tensor? entropy, Tensor? grad_entropy"  # both or neither
_GRADIENTS = "Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias"


def _tokens(nll: Tensor, norm: Tensor, *metrics: Tensor) -> Tensors:
    """The results of an operator that always returns five."""
    return nll, norm, *_all_metrics(norm, metrics)


def _all_metrics(norm: Tensor, metrics: Tensors) -> Tensors:
    """The metrics that there are, and empty tensors in place of the others."""
    none = norm.new_empty(0), norm.new_empty(0, dtype=torch.int64), norm.new_empty(0)
    return *metrics, *none[len(metrics) :]


def _fake_tokens(x: Tensor, labels: Tensor, metrics: int) -> Tensors:
    nll = x.new_empty(labels.shape, dtype=accumulate_dtype(x.dtype))
    prediction = torch.empty_like(nll, dtype=torch.int64)
    found = (torch.empty_like(nll), prediction, torch.empty_like(nll))[:metrics]
    return _tokens(nll, nll.new_empty(*labels.shape, 2), *found)


def _fake_gradients(head: Head, needs: Needs, dtype: torch.dtype) -> Tensors:
    shapes = (head.hidden.shape, head.weight.shape, head.weight.shape[:1])
    return tuple(
        head.weight.new_empty(shape if needed else (0,), dtype=dtype)
        for shape, needed in zip(shapes, needs, strict=True)
    )


def _as_is(x: Tensor) -> AbstractContextManager[object]:
    """A context without autocast: an operator computes in the dtypes that it was given."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def _keep_entropy(ctx: Any, output: Tensors, metrics: int) -> Tensor | None:
    """The entropies, if any, for the backward: beside the losses only they have a gradient."""
    _, norm, entropy, *others = output
    ctx.mark_non_differentiable(norm, *others, *(() if metrics else (entropy,)))
    return entropy if metrics else None


def _save(ctx: Any, opt: Options, *tensors: Tensor | None) -> None:
    """Keeps options and tensors for the backward."""
    ctx.opt = opt._replace(class_weight=None)
    ctx.save_for_backward(opt.class_weight, *tensors)


def _saved(ctx: Any) -> tuple[Options, list[Any]]:
    """What `_save` kept. Checkpointing allows no second look."""
    class_weight, *tensors = ctx.saved_tensors
    return ctx.opt._replace(class_weight=class_weight), tensors


def _or_zeros(grad_nll: Tensor | None, grad_entropy: Tensor | None) -> Tensor:
    """The gradient with respect to the losses, which only one of the two may have."""
    return torch.zeros_like(cast(Tensor, grad_entropy)) if grad_nll is None else grad_nll


def _of_entropy(entropy: Tensor | None, grad: Tensor | None) -> OfEntropy | None:
    return None if entropy is None or grad is None else OfEntropy(entropy, grad)


def _refuse(*_: Any) -> Any:
    raise NotImplementedError(
        "the gradients of the fused backends cannot be differentiated again: use "
        'backend="reference" for second derivatives'
    )


# nvamp::token_nll --------------------------------------------------------------------------------------


@operator(
    "nvamp::token_nll",
    f"(Tensor logits, Tensor labels, int metrics, bool inplace_backward, {_OPTIONS}) -> {_TOKENS}",
)
def token_nll(
    logits: Tensor, labels: Tensor, metrics: int, inplace_backward: bool, backend: str, opt: Options
) -> Tensors:
    check_label_range(labels, logits.shape[-1], opt.ignore_index)
    return _tokens(*load(backend).token_nll(logits, labels, metrics, opt))


@token_nll.register_fake
def _(logits: Tensor, labels: Tensor, metrics: int, *_: Any) -> Tensors:
    return _fake_tokens(logits, labels, metrics)


@operator(
    "nvamp::token_nll_backward",
    f"(Tensor grad_nll, Tensor logits, Tensor labels, Tensor norm, {_OF_PART}, {_OF_ENTROPY}, "
    f"{_OPTIONS}) -> Tensor",
)
def token_nll_backward(
    grad_nll: Tensor,
    logits: Tensor,
    labels: Tensor,
    norm: Tensor,
    classes: Tensor | None,
    weights: Tensor | None,
    entropy: Tensor | None,
    grad_entropy: Tensor | None,
    backend: str,
    opt: Options,
) -> Tensor:
    grad = in_huge_pages(logits.new_empty(logits.shape))
    if logits.shape[-1]:
        of_entropy = _of_entropy(entropy, grad_entropy)
        args = grad_nll, logits, labels, norm, opt, grad, classes, of_entropy, weights
        load(backend).token_nll_backward(*args)
    return grad


@token_nll_backward.register_fake
def _(grad_nll: Tensor, logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(logits.shape)


token_nll_backward.register_autograd(_refuse)


def _token_nll_backward_(
    grad_nll: Tensor,
    logits: Tensor,
    labels: Tensor,
    norm: Tensor,
    classes: Tensor | None,
    weights: Tensor | None,
    entropy: Tensor | None,
    grad_entropy: Tensor | None,
    backend: str,
    opt: Options,
) -> Tensor:
    """Writes the gradient over the logits; a later use of them then raises PyTorch's error."""
    grad = logits.detach()
    if logits.shape[-1]:
        of_entropy = _of_entropy(entropy, grad_entropy)
        args = grad_nll, grad, labels, norm, opt, grad, classes, of_entropy, weights
        load(backend).token_nll_backward(*args)
    torch.autograd.graph.increment_version(grad)
    return grad


def _token_nll_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
    logits, labels, metrics, inplace, ctx.backend, opt = inputs
    ctx.inplace = inplace and not saving_is_hooked()
    entropy = _keep_entropy(ctx, output, metrics)
    _save(ctx, opt, logits, labels, output[1], None, None, entropy)


def _token_nll_autograd(
    ctx: Any, grad_nll: Tensor | None, _norm: None, grad_entropy: Tensor | None, *_: None
) -> tuple[Tensor]:
    return _logits_gradient(ctx, grad_nll, grad_entropy)


def _logits_gradient(ctx: Any, grad_nll: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor]:
    opt, (logits, labels, norm, *of_part, entropy) = _saved(ctx)
    grads = [grad for grad in (grad_nll, grad_entropy) if grad is not None]
    in_place = ctx.inplace and not is_of_leaf(logits) and no_overlap(logits)
    in_place = in_place and all(may_use_up(logits, grad) for grad in grads)
    backward = _token_nll_backward_ if in_place else token_nll_backward
    entropies = (None, None) if grad_entropy is None else (entropy, grad_entropy)
    grad_nll = _or_zeros(grad_nll, grad_entropy)
    args = grad_nll, logits, labels, norm, *of_part, *entropies, ctx.backend, opt
    return (cast(Tensor, backward(*args)),)


token_nll.register_autograd(_token_nll_autograd, setup_context=_token_nll_setup)


# A few rows on a CPU -----------------------------------------------------------------------------------

FEW_ROWS = 16


def are_few(logits: Tensor, labels: Tensor) -> bool:
    """Whether `few_token_nll` is of use: a plain call on a CPU with a gradient to take, of a few rows.

    There, computing the softmax again in the backward costs more time than memory is worth.
    """
    if torch.compiler.is_compiling():
        return False
    few = 0 < labels.numel() <= FEW_ROWS and devices.can_look(logits)
    return few and torch.is_grad_enabled() and logits.requires_grad and is_plain((logits, labels))


class _FewTokenNLL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, opt: Options) -> Tensor:
        check_label_range(labels, logits.shape[-1], opt.ignore_index)
        unit = torch.empty(logits.shape, dtype=accumulate_dtype(logits.dtype))
        nll = chunked.unit_gradient(logits, labels, opt, out=unit)
        ctx.save_for_backward(unit, logits, labels)
        ctx.ignore_index = opt.ignore_index
        return nll.view(labels.shape)

    @staticmethod
    def backward(ctx: Any, grad_nll: Tensor) -> tuple[Tensor | None, ...]:
        unit, logits, labels = ctx.saved_tensors
        grad_nll = grad_nll.masked_fill(labels == ctx.ignore_index, 0)  # it may be NaN there
        if may_use_up(unit, grad_nll):  # autograd casts it
            return unit.mul_(grad_nll[..., None]), None, None
        return scale_rows(unit, grad_nll, logits), None, None


def few_token_nll(logits: Tensor, labels: Tensor, opt: Options) -> Tensors:
    """`token_nll` that makes the gradient together with the losses, on `"chunked"`."""
    nll: Tensor = _FewTokenNLL.apply(logits, labels, opt)  # type: ignore[no-untyped-call]
    return (nll,)


@operator("nvamp::scale_rows", "(Tensor unit, Tensor scale, Tensor logits) -> Tensor")
def scale_rows(unit: Tensor, scale: Tensor, logits: Tensor) -> Tensor:
    """The gradient with respect to logits, on which it depends, although the logits are not used."""
    return (unit * scale[..., None]).to(logits.dtype)


@scale_rows.register_fake
def _(unit: Tensor, scale: Tensor, logits: Tensor) -> Tensor:
    return torch.empty_like(unit, dtype=logits.dtype)


scale_rows.register_autograd(_refuse)


# nvamp::linear_token_nll -------------------------------------------------------------------------------


@operator(
    "nvamp::linear_token_nll",
    f"({_HEAD}, int metrics, ScalarType? accum_dtype, {_OPTIONS}) -> {_TOKENS}",
)
def linear_token_nll(
    head: Head, metrics: int, accum_dtype: torch.dtype | None, backend: str, opt: Options
) -> Tensors:
    check_label_range(head.labels, len(head.weight), opt.ignore_index)
    with _as_is(head.hidden):
        return _tokens(*linear.token_nll(load(backend), head, metrics, accum_dtype, opt))


@linear_token_nll.register_fake
def _(head: Head, metrics: int, *_: Any) -> Tensors:
    return _fake_tokens(head.hidden, head.labels, metrics)


@operator(
    "nvamp::linear_token_nll_backward",
    f"(Tensor grad_nll, Tensor norm, {_OF_PART}, {_OF_ENTROPY}, {_HEAD}, {_NEEDS}, "
    f"ScalarType? accum_dtype, {_OPTIONS}) -> ({_GRADIENTS})",
)
def linear_token_nll_backward(
    grad_nll: Tensor,
    norm: Tensor,
    classes: Tensor | None,
    weights: Tensor | None,
    entropy: Tensor | None,
    grad_entropy: Tensor | None,
    head: Head,
    needs: Needs,
    accum_dtype: torch.dtype | None,
    backend: str,
    opt: Options,
) -> Tensors:
    if not len(head.weight):
        return tuple(torch.zeros_like(x) for x in _fake_gradients(head, needs, head.weight.dtype))
    of_entropy = _of_entropy(entropy, grad_entropy)
    with _as_is(head.hidden):
        return linear.token_nll_backward(
            load(backend), grad_nll, norm, classes, weights, of_entropy, head, needs, accum_dtype, opt
        )


@linear_token_nll_backward.register_fake
def _(
    grad_nll: Tensor,
    norm: Tensor,
    classes: Tensor | None,
    weights: Tensor | None,
    entropy: Tensor | None,
    grad_entropy: Tensor | None,
    head: Head,
    needs: Needs,
    *_: Any,
) -> Tensors:
    return _fake_gradients(head, needs, head.weight.dtype)


linear_token_nll_backward.register_autograd(_refuse)


def _linear_token_nll_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
    head, metrics, ctx.accum_dtype, ctx.backend, opt = inputs
    entropy = _keep_entropy(ctx, output, metrics)
    _save(ctx, opt, output[1], None, None, entropy, *head)


def _linear_token_nll_autograd(
    ctx: Any, grad_nll: Tensor | None, _norm: None, grad_entropy: Tensor | None, *_: None
) -> list[Tensor | None]:
    return _head_gradients(ctx, grad_nll, grad_entropy)


def _head_gradients(ctx: Any, grad_nll: Tensor | None, grad_entropy: Tensor | None) -> list[Tensor | None]:
    opt, (norm, classes, weights, entropy, *tensors) = _saved(ctx)
    head, needs = Head(*tensors), Needs(*ctx.needs_input_grad[:3])
    entropies = (None, None) if grad_entropy is None else (entropy, grad_entropy)
    grad_nll = _or_zeros(grad_nll, grad_entropy)
    args = head, needs, ctx.accum_dtype, ctx.backend, opt
    return _present(linear_token_nll_backward(grad_nll, norm, classes, weights, *entropies, *args), needs)


def _present(grads: Tensors, needs: Needs) -> list[Tensor | None]:
    return [grad if needed else None for grad, needed in zip(grads, needs, strict=True)]


linear_token_nll.register_autograd(_linear_token_nll_autograd, setup_context=_linear_token_nll_setup)


# nvamp::linear_nll_sum ---------------------------------------------------------------------------------


@operator(
    "nvamp::linear_nll_sum",
    f"({_HEAD}, {_NEEDS}, SymInt few, int metrics, bool use_up, ScalarType? accum_dtype, {_OPTIONS}) "
    f"-> (Tensor sum, {_TOKENS[1:-1]}, {fields_of(Units)})",
)
def linear_nll_sum(
    head: Head,
    needs: Needs,
    few: int,
    metrics: int,
    use_up: bool,
    accum_dtype: torch.dtype | None,
    backend: str,
    opt: Options,
) -> Tensors:
    """`use_up`: the caller does not read the gradients, so the backward may finish them in place.

    That saves a copy of the weight. A backward that is compiled or keeps the graph does not do so.
    """
    check_label_range(head.labels, len(head.weight), opt.ignore_index)
    with _as_is(head.hidden):
        tokens, units = linear.unit_gradients(load(backend), head, needs, few, metrics, accum_dtype, opt)
    nll, *rest = tokens
    return nll.sum(), *_tokens(nll, *(rest or (nll.new_empty(0, 2),))), *units


@linear_nll_sum.register_fake
def _(
    head: Head,
    needs: Needs,
    few: int,
    metrics: int,
    use_up: bool,
    accum_dtype: torch.dtype | None,
    *_: Any,
) -> Tensors:
    nll, norm, *rest = _fake_tokens(head.hidden, head.labels, metrics)
    norm = norm if metrics else norm.new_empty(0, 2)
    index = head.labels.new_empty(int(few == 1), dtype=torch.int64)
    max_grad = head.weight.new_empty(len(head.weight) if few == 1 else 0)
    max_hidden = head.hidden.new_empty(head.hidden.shape[1] if few == 1 else 0)
    hidden, weight, bias = _fake_gradients(head, needs, linear.held_dtype(head.weight, accum_dtype))
    return (
        nll.new_empty(()),
        nll,
        norm,
        *rest,
        index,
        max_grad,
        max_hidden,
        hidden,
        weight,
        bias.to(nll.dtype),
    )


@operator(
    "nvamp::linear_nll_sum_backward",
    f"(Tensor grad_sum, Tensor? grad_nll, {fields_of(Units)}, {_HEAD}, {_NEEDS}, SymInt few, "
    f"ScalarType? accum_dtype, {_OPTIONS}) -> (Tensor by_hidden, Tensor by_weight, Tensor by_bias)",
)
def linear_nll_sum_backward(
    grad_sum: Tensor,
    grad_nll: Tensor | None,
    units: Units,
    head: Head,
    needs: Needs,
    few: int,
    accum_dtype: torch.dtype | None,
    backend: str,
    opt: Options,
) -> Tensors:
    return _weighted_gradients(False, grad_sum, grad_nll, units, head, needs, few, accum_dtype, backend, opt)


@linear_nll_sum_backward.register_fake
def _(grad_sum: Tensor, grad_nll: Tensor | None, units: Units, head: Head, *_: Any) -> Tensors:
    grads = units.grad_hidden, units.grad_weight, units.grad_bias
    return tuple(torch.empty_like(grad, dtype=head.weight.dtype) for grad in grads)


linear_nll_sum_backward.register_autograd(_refuse)


def _weighted_gradients(
    in_place: bool,
    grad_sum: Tensor,
    grad_nll: Tensor | None,
    units: Units,
    head: Head,
    needs: Needs,
    few: int,
    accum_dtype: torch.dtype | None,
    backend: str,
    opt: Options,
) -> Tensors:
    with _as_is(head.hidden):
        return linear.weighted_gradients(
            load(backend), grad_sum, grad_nll, units, head, needs, few, accum_dtype, opt, in_place
        )


def _linear_nll_sum_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
    head, ctx.needs, ctx.few, _, use_up, ctx.accum_dtype, ctx.backend, opt = inputs
    ctx.use_up = use_up and not saving_is_hooked()  # a hook may keep what it saves
    ctx.mark_non_differentiable(*output[2 if ctx.few else 1 :])
    _save(ctx, opt, *head, *output[6:])


def _linear_nll_sum_autograd(
    ctx: Any, grad_sum: Tensor | None, grad_nll: Tensor | None, *_: Any
) -> list[Tensor | None]:
    opt, (hidden, weight, bias, labels, *units) = _saved(ctx)
    if grad_sum is None:
        assert grad_nll is not None
        grad_sum = grad_nll.new_zeros(())
    args = (grad_sum, grad_nll, Units(*units), Head(hidden, weight, bias, labels), ctx.needs)
    rest = (ctx.few, ctx.accum_dtype, ctx.backend, opt)
    if ctx.use_up and may_use_up(units[0], grad_sum, grad_nll):
        grads = _weighted_gradients(True, *args, *rest)
    else:
        grads = linear_nll_sum_backward(*args, *rest)
    return _present(grads, ctx.needs)


linear_nll_sum.register_autograd(_linear_nll_sum_autograd, setup_context=_linear_nll_sum_setup)


# A vocabulary in parts --------------------------------------------------------------------------------

_STATISTICS = f"(Tensor norm, Tensor at_label, Tensor sum_below, {_METRICS})"
_RESULTS = "(Tensor nll, Tensor entropy)"


class Whole(NamedTuple):
    """What the ranks have computed together, for the whole vocabulary."""

    norm: Tensor  # [..., 2]
    nll: Tensor  # [...]
    classes: Tensor  # int64 []: how many there are
    weights: Tensor | None  # [..., 2], those of `weights_of`
    entropy: Tensor | None  # [...]; None without metrics


def _statistics(norm: Tensor, at_label: Tensor, sum_below: Tensor, *metrics: Tensor) -> Tensors:
    """The results of an operator that always returns six."""
    return norm, at_label, sum_below, *_all_metrics(norm, metrics)


def _of_no_class(x: Tensor, labels: Tensor, metrics: int) -> Tensors:
    """The statistics of an empty part."""
    zeros = x.new_zeros(labels.shape, dtype=accumulate_dtype(x.dtype))
    norm = torch.stack((zeros - torch.inf, zeros), -1)
    found = (zeros.clone(), zeros.long(), zeros.clone())[:metrics]
    return _statistics(norm, zeros, zeros.clone(), *found)


def _fake_statistics(x: Tensor, labels: Tensor, metrics: int) -> Tensors:
    nll, norm, *rest = _fake_tokens(x, labels, metrics)
    return norm, nll, torch.empty_like(nll), *rest


@operator(
    "nvamp::part_statistics",
    f"(Tensor logits, Tensor labels, int metrics, {_OPTIONS}) -> {_STATISTICS}",
)
def part_statistics(logits: Tensor, labels: Tensor, metrics: int, backend: str, opt: Options) -> Tensors:
    if not logits.shape[-1]:
        return _of_no_class(logits, labels, metrics)
    return _statistics(*load(backend).part_statistics(logits, labels, metrics, opt))


@part_statistics.register_fake
def _(logits: Tensor, labels: Tensor, metrics: int, *_: Any) -> Tensors:
    return _fake_statistics(logits, labels, metrics)


def _results(whole: Whole) -> Tensors:
    return whole.nll.clone(), whole.nll.new_empty(0) if whole.entropy is None else whole.entropy.clone()


def _fake_results(whole: Whole) -> Tensors:
    nll, entropy = torch.empty_like(whole.nll), whole.entropy
    return nll, nll.new_empty(0) if entropy is None else torch.empty_like(entropy)


@operator(
    "nvamp::part_nll",
    f"(Tensor logits, Tensor labels, {fields_of(Whole)}, bool inplace_backward, {_OPTIONS}) -> {_RESULTS}",
)
def part_nll(
    logits: Tensor, labels: Tensor, whole: Whole, inplace_backward: bool, backend: str, opt: Options
) -> Tensors:
    return _results(whole)


@part_nll.register_fake
def _(logits: Tensor, labels: Tensor, whole: Whole, *_: Any) -> Tensors:
    return _fake_results(whole)


def _part_nll_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
    logits, labels, whole, inplace, ctx.backend, opt = inputs
    ctx.inplace = inplace and not saving_is_hooked()
    if whole.entropy is None:
        ctx.mark_non_differentiable(output[1])
    _save(ctx, opt, logits, labels, whole.norm, whole.classes, whole.weights, whole.entropy)


part_nll.register_autograd(_logits_gradient, setup_context=_part_nll_setup)


@operator(
    "nvamp::linear_part_statistics",
    f"({_HEAD}, int metrics, ScalarType? accum_dtype, {_OPTIONS}) -> {_STATISTICS}",
)
def linear_part_statistics(
    head: Head, metrics: int, accum_dtype: torch.dtype | None, backend: str, opt: Options
) -> Tensors:
    if not len(head.weight):
        return _of_no_class(head.hidden, head.labels, metrics)
    with _as_is(head.hidden):
        return _statistics(*linear.part_statistics(load(backend), head, metrics, accum_dtype, opt))


@linear_part_statistics.register_fake
def _(head: Head, metrics: int, *_: Any) -> Tensors:
    return _fake_statistics(head.hidden, head.labels, metrics)


@operator(
    "nvamp::linear_part_nll",
    f"({_HEAD}, {fields_of(Whole)}, ScalarType? accum_dtype, {_OPTIONS}) -> {_RESULTS}",
)
def linear_part_nll(
    head: Head, whole: Whole, accum_dtype: torch.dtype | None, backend: str, opt: Options
) -> Tensors:
    return _results(whole)


@linear_part_nll.register_fake
def _(head: Head, whole: Whole, *_: Any) -> Tensors:
    return _fake_results(whole)


def _linear_part_nll_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
    head, whole, ctx.accum_dtype, ctx.backend, opt = inputs
    if whole.entropy is None:
        ctx.mark_non_differentiable(output[1])
    _save(ctx, opt, whole.norm, whole.classes, whole.weights, whole.entropy, *head)


linear_part_nll.register_autograd(_head_gradients, setup_context=_linear_part_nll_setup)
