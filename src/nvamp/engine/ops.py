"""The engine's operators: what autograd, a compiler and an exporter see of the backends.

nvamp::token_nll             losses from logits; the backward recomputes the softmax
nvamp::linear_token_nll      losses from hidden states; the backward recomputes the logits too: four
                             matrix products, and any weights
nvamp::linear_nll_sum_max    sum and maximum of the losses from hidden states, in three products: the
                             gradient of the sum is made while each chunk of logits is there, and the
                             backward scales it and adds the rank-one gradient of the largest loss

The first two have twins for a vocabulary in parts, one on each rank. Between what they do, the parts are put
together: `nvamp.engine.parts`.

nvamp::part_statistics, nvamp::linear_part_statistics    what the losses follow from, of one part
nvamp::part_nll, nvamp::linear_part_nll                  the losses, and their gradients by that part
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

from nvamp.engine import linear
from nvamp.engine.backend import Backend
from nvamp.engine.backends import load
from nvamp.engine.checks import check_label_range
from nvamp.engine.hugepages import in_huge_pages
from nvamp.engine.operator import is_ordinary, operator
from nvamp.engine.options import Head, Needs, Options, accumulate_dtype

Tensors = tuple[Tensor, ...]

_OPTIONS = (
    "str backend, int ignore_index, float label_smoothing, float z_loss, float? softcap, float logit_scale"
)
_HEAD = "Tensor hidden, Tensor weight, Tensor? bias, Tensor labels"
_NEEDS = "bool needs_hidden, bool needs_weight, bool needs_bias"
_TOKENS = "(Tensor nll, Tensor norm, Tensor entropy, Tensor correct)"
_GRADIENTS = "Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias"


def _backend(args: tuple[Any, ...]) -> tuple[Backend, Options]:
    """The last arguments of every operator that looks at logits."""
    return load(args[0]), Options(*args[1:])


def _tokens(nll: Tensor, norm: Tensor, *metrics: Tensor) -> Tensors:
    """Results of an operator that always has four."""
    return nll, norm, *(metrics or (nll.new_empty(0), nll.new_empty(0, dtype=torch.bool)))


def _fake_tokens(x: Tensor, labels: Tensor, metrics: bool) -> Tensors:
    nll = x.new_empty(labels.shape, dtype=accumulate_dtype(x.dtype))
    entropy = torch.empty_like(nll) if metrics else nll.new_empty(0)
    return nll, nll.new_empty(*labels.shape, 2), entropy, torch.empty_like(entropy, dtype=torch.bool)


def _fake_gradients(head: Head, needs: Needs, dtype: torch.dtype) -> Tensors:
    shapes = (head.hidden.shape, head.weight.shape, head.weight.shape[:1])
    return tuple(
        head.weight.new_empty(shape if needed else (0,), dtype=dtype)
        for shape, needed in zip(shapes, needs, strict=True)
    )


def _as_is(x: Tensor) -> AbstractContextManager[object]:
    """Inside, no autocast: an operator computes in the dtypes that it was given."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def _refuse(*_: Any) -> Any:
    raise NotImplementedError(
        "the gradients of the fused backends cannot be differentiated again: use "
        'backend="reference" for second derivatives'
    )


# nvamp::token_nll --------------------------------------------------------------------------------------


@operator(
    "nvamp::token_nll",
    f"(Tensor logits, Tensor labels, bool metrics, bool inplace_backward, {_OPTIONS}) -> {_TOKENS}",
)
def token_nll(logits: Tensor, labels: Tensor, metrics: bool, inplace_backward: bool, *args: Any) -> Tensors:
    backend, opt = _backend(args)
    check_label_range(labels, logits.shape[-1], opt.ignore_index)
    return _tokens(*backend.token_nll(logits, labels, metrics, opt))


@token_nll.register_fake
def _(logits: Tensor, labels: Tensor, metrics: bool, inplace_backward: bool, *args: Any) -> Tensors:
    return _fake_tokens(logits, labels, metrics)


@operator(
    "nvamp::token_nll_backward",
    f"(Tensor grad_nll, Tensor logits, Tensor labels, Tensor norm, Tensor? classes, {_OPTIONS}) -> Tensor",
)
def token_nll_backward(
    grad_nll: Tensor, logits: Tensor, labels: Tensor, norm: Tensor, classes: Tensor | None, *args: Any
) -> Tensor:
    backend, opt = _backend(args)
    grad = in_huge_pages(logits.new_empty(logits.shape))
    if logits.shape[-1]:
        backend.token_nll_backward(grad_nll, logits, labels, norm, opt, out=grad, classes=classes)
    return grad


@token_nll_backward.register_fake
def _(grad_nll: Tensor, logits: Tensor, *args: Any) -> Tensor:
    return logits.new_empty(logits.shape)


token_nll_backward.register_autograd(_refuse)


def _token_nll_backward_(
    grad_nll: Tensor, logits: Tensor, labels: Tensor, norm: Tensor, classes: Tensor | None, *args: Any
) -> Tensor:
    """The gradient in the memory of the logits, so that whoever still needs them gets PyTorch's error."""
    backend, opt = _backend(args)
    grad = logits.detach()
    if logits.shape[-1]:
        backend.token_nll_backward(grad_nll, grad, labels, norm, opt, out=grad, classes=classes)
    torch.autograd.graph.increment_version(grad)
    return grad


def _token_nll_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
    logits, labels, _, inplace, *ctx.args = inputs
    ctx.inplace = inplace and not _saving_is_hooked()
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(logits, labels, output[1])


def _token_nll_autograd(ctx: Any, grad_nll: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    logits, labels, norm = ctx.saved_tensors
    grad = _logits_gradient(grad_nll, logits, labels, norm, None, ctx.inplace, ctx.args)
    return grad, None, None, None, *(None for _ in ctx.args)


def _logits_gradient(
    grad_nll: Tensor,
    logits: Tensor,
    labels: Tensor,
    norm: Tensor,
    classes: Tensor | None,
    inplace: bool,
    args: list[Any],
) -> Tensor:
    in_place = inplace and not _is_of_leaf(logits) and _may_use_up(logits, grad_nll) and _no_overlap(logits)
    backward = _token_nll_backward_ if in_place else token_nll_backward
    return cast(Tensor, backward(grad_nll, logits, labels, norm, classes, *args))


def _may_use_up(saved: Tensor, grad: Tensor) -> bool:
    """Whether a backward, of this gradient, may overwrite what it saved.

    Not a compiled one, nor one that keeps the graph, nor one of a batch of gradients, nor one that is
    differentiated itself.
    """
    if type(saved) is not Tensor or not is_ordinary(saved) or not is_ordinary(grad):
        return False
    if is_functorch_wrapped_tensor(grad):
        return False
    return not _graph_is_kept() and not torch.is_grad_enabled()


def _saving_is_hooked() -> bool:
    """Whether what is saved now goes through hooks, as under checkpointing: it is not protected then.

    Autograd looks for changes only of tensors that it saved itself.
    """
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def _graph_is_kept() -> bool:
    """Whether the running backward has `retain_graph=True`; yes where PyTorch does not say."""
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if ask is None else bool(ask())


def _is_of_leaf(x: Tensor) -> bool:
    """Whether x is a leaf, such as a parameter, or lies in the memory of one."""
    return x.is_leaf or (x._base is not None and x._base.is_leaf)


def _no_overlap(x: Tensor) -> bool:
    """Whether no two elements of x share memory, as those of an expanded tensor do."""
    extent = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1 and stride < extent:
            return False
        extent = max(extent, stride * size)
    return True


token_nll.register_autograd(_token_nll_autograd, setup_context=_token_nll_setup)


# nvamp::linear_token_nll -------------------------------------------------------------------------------


@operator(
    "nvamp::linear_token_nll",
    f"({_HEAD}, bool metrics, ScalarType? accum_dtype, {_OPTIONS}) -> {_TOKENS}",
)
def linear_token_nll(*args: Any) -> Tensors:
    head, metrics, (backend, opt) = Head(*args[:4]), args[4], _backend(args[6:])
    check_label_range(head.labels, len(head.weight), opt.ignore_index)
    with _as_is(head.hidden):
        return _tokens(*linear.token_nll(backend, head, metrics, args[5], opt))


@linear_token_nll.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Any, labels: Tensor, metrics: bool, *args: Any) -> Tensors:
    return _fake_tokens(hidden, labels, metrics)


@operator(
    "nvamp::linear_token_nll_backward",
    f"(Tensor grad_nll, Tensor norm, Tensor? classes, {_HEAD}, {_NEEDS}, ScalarType? accum_dtype, "
    f"{_OPTIONS}) -> ({_GRADIENTS})",
)
def linear_token_nll_backward(grad_nll: Tensor, norm: Tensor, classes: Tensor | None, *args: Any) -> Tensors:
    head, needs, (backend, opt) = Head(*args[:4]), Needs(*args[4:7]), _backend(args[8:])
    if not len(head.weight):
        return tuple(torch.zeros_like(x) for x in _fake_gradients(head, needs, head.weight.dtype))
    with _as_is(head.hidden):
        return linear.token_nll_backward(backend, grad_nll, norm, classes, head, needs, args[7], opt)


@linear_token_nll_backward.register_fake
def _(grad_nll: Tensor, norm: Tensor, classes: Tensor | None, *args: Any) -> Tensors:
    head = Head(*args[:4])
    return _fake_gradients(head, Needs(*args[4:7]), head.weight.dtype)


linear_token_nll_backward.register_autograd(_refuse)


def _linear_token_nll_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
    ctx.args = inputs[5:]
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(output[1], None, *inputs[:4])


def _linear_token_nll_autograd(ctx: Any, grad_nll: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    needs = Needs(*ctx.needs_input_grad[:3])
    grads = linear_token_nll_backward(grad_nll, *ctx.saved_tensors, *needs, *ctx.args)
    return *_present(grads, needs), None, None, *(None for _ in ctx.args)


def _present(grads: Tensors, needs: Needs) -> list[Tensor | None]:
    return [grad if needed else None for grad, needed in zip(grads, needs, strict=True)]


linear_token_nll.register_autograd(_linear_token_nll_autograd, setup_context=_linear_token_nll_setup)


# nvamp::linear_nll_sum_max -----------------------------------------------------------------------------

# What the backward needs of the row of the largest loss, and the gradients of the sum of the losses.
_UNITS = f"Tensor max_index, Tensor max_grad, Tensor max_hidden, {_GRADIENTS}"


@operator(
    "nvamp::linear_nll_sum_max",
    f"({_HEAD}, {_NEEDS}, bool use_up, ScalarType? accum_dtype, {_OPTIONS}) "
    f"-> (Tensor sum, Tensor max, Tensor nll, {_UNITS})",
)
def linear_nll_sum_max(*args: Any) -> Tensors:
    """`use_up`: the caller does not look at the gradients, so the backward may finish them in place.

    That saves a copy of the weight. A compiled backward, or one that keeps the graph, leaves them alone.
    """
    head, needs, (backend, opt) = Head(*args[:4]), Needs(*args[4:7]), _backend(args[9:])
    check_label_range(head.labels, len(head.weight), opt.ignore_index)
    with _as_is(head.hidden):
        nll, index, *units = linear.unit_gradients(backend, head, needs, args[8], opt)
    index = index.clone()  # no view: a fake tensor knows nothing of what else its memory holds
    # Where no row has a label, the first row is an ignored one: its loss is 0.
    largest = nll.gather(0, index[None])[0] if len(nll) else nll.new_zeros(())
    return nll.sum(), largest, nll, index, *units


@linear_nll_sum_max.register_fake
def _(*args: Any) -> Tensors:
    head, needs = Head(*args[:4]), Needs(*args[4:7])
    nll, *_ = _fake_tokens(head.hidden, head.labels, False)
    scalar = nll.new_empty(())
    index = torch.empty_like(scalar, dtype=torch.int64)
    of_max = head.weight.new_empty(len(head.weight)), head.hidden.new_empty(head.hidden.shape[1])
    hidden, weight, bias = _fake_gradients(head, needs, linear.held_dtype(head.weight, args[8]))
    return scalar, torch.empty_like(scalar), nll, index, *of_max, hidden, weight, bias.to(nll.dtype)


@operator(
    "nvamp::linear_nll_sum_max_backward",
    f"(Tensor hidden, Tensor weight, Tensor? bias, Tensor grad_sum, Tensor? grad_max, {_UNITS}, "
    f"{_NEEDS}, str backend) -> ({_GRADIENTS})",
)
def linear_nll_sum_max_backward(*args: Any) -> Tensors:
    """The first three are there for autograd, to refuse their second derivatives and not to miss them."""
    return _scale_unit_gradients(False, *args[3:])


@linear_nll_sum_max_backward.register_fake
def _(hidden: Tensor, *args: Any) -> Tensors:
    return tuple(torch.empty_like(unit, dtype=hidden.dtype) for unit in args[7:10])


linear_nll_sum_max_backward.register_autograd(_refuse)


def _scale_unit_gradients(
    in_place: bool,
    grad_sum: Tensor,
    grad_max: Tensor | None,
    max_index: Tensor,
    max_grad: Tensor,
    max_hidden: Tensor,
    grad_hidden: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
    backend: str,
) -> Tensors:
    """grad_sum·(unit gradients) + grad_max·(gradients of the largest loss), in the dtype of the inputs."""
    dtype = max_hidden.dtype

    def room_for(unit: Tensor) -> Tensor:
        return unit if in_place and unit.dtype == dtype else torch.empty_like(unit, dtype=dtype)

    hidden = room_for(grad_hidden)
    if needs_hidden:
        scale = grad_sum
        if grad_max is not None:  # its row of the largest loss is the gradient of that loss already
            is_max = torch.arange(len(grad_hidden), device=max_index.device) == max_index
            scale = (grad_sum + grad_max * is_max)[:, None]
        torch.mul(grad_hidden, scale, out=hidden)
    if in_place and hidden is not grad_hidden:
        grad_hidden.untyped_storage().resize_(0)  # nobody looks at it again: room for the next
    weight = room_for(grad_weight)
    if needs_weight:
        with _as_is(grad_weight):
            load(backend).scale_and_add(grad_weight, grad_sum, grad_max, max_grad, max_hidden, out=weight)
    bias = grad_bias * grad_sum
    if needs_bias and grad_max is not None:
        bias += grad_max * max_grad
    return hidden, weight, bias.to(dtype)


def _linear_nll_sum_max_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
    ctx.needs, ctx.backend = inputs[4:7], inputs[9]
    ctx.use_up = inputs[7] and not _saving_is_hooked()  # a hook may keep what it saves
    ctx.num_options = len(inputs) - 4
    ctx.mark_non_differentiable(*output[2:])
    ctx.save_for_backward(*output[3:], *inputs[:3])


def _linear_nll_sum_max_autograd(
    ctx: Any, grad_sum: Tensor | None, grad_max: Tensor | None, *_: Any
) -> tuple[Tensor | None, ...]:
    rest = (None,) * ctx.num_options
    saved = ctx.saved_tensors  # once: checkpointing allows no second look
    units, inputs = saved[:6], saved[6:]
    if grad_sum is None:
        assert grad_max is not None
        grad_sum = torch.zeros_like(grad_max)
    args = (grad_sum, grad_max, *units, *ctx.needs, ctx.backend)
    if ctx.use_up and _may_use_up(units[0], grad_sum):
        grads = _scale_unit_gradients(True, *args)
    else:
        grads = linear_nll_sum_max_backward(*inputs, *args)
    return *_present(grads, Needs(*ctx.needs)), None, *rest


linear_nll_sum_max.register_autograd(_linear_nll_sum_max_autograd, setup_context=_linear_nll_sum_max_setup)


# A vocabulary in parts --------------------------------------------------------------------------------

_STATISTICS = "(Tensor norm, Tensor at_label, Tensor sum_z)"
_WHOLE = "Tensor norm, Tensor nll, Tensor classes"  # of the whole vocabulary


def _of_no_class(x: Tensor, labels: Tensor) -> Tensors:
    """The statistics of an empty part."""
    zeros = x.new_zeros(labels.shape, dtype=accumulate_dtype(x.dtype))
    return torch.stack((zeros - torch.inf, zeros), -1), zeros, zeros.clone()


def _fake_statistics(x: Tensor, labels: Tensor) -> Tensors:
    nll, norm, *_ = _fake_tokens(x, labels, False)
    return norm, nll, torch.empty_like(nll)


@operator(
    "nvamp::part_statistics",
    f"(Tensor logits, Tensor labels, {_OPTIONS}) -> {_STATISTICS}",
)
def part_statistics(logits: Tensor, labels: Tensor, *args: Any) -> Tensors:
    backend, opt = _backend(args)
    if not logits.shape[-1]:
        return _of_no_class(logits, labels)
    return backend.part_statistics(logits, labels, opt)


@part_statistics.register_fake
def _(logits: Tensor, labels: Tensor, *args: Any) -> Tensors:
    return _fake_statistics(logits, labels)


@operator(
    "nvamp::part_nll",
    f"(Tensor logits, Tensor labels, {_WHOLE}, bool inplace_backward, {_OPTIONS}) -> Tensor",
)
def part_nll(logits: Tensor, labels: Tensor, norm: Tensor, nll: Tensor, *args: Any) -> Tensor:
    return nll.clone()


@part_nll.register_fake
def _(logits: Tensor, labels: Tensor, norm: Tensor, nll: Tensor, *args: Any) -> Tensor:
    return torch.empty_like(nll)


def _part_nll_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    logits, labels, norm, _, classes, inplace, *ctx.args = inputs
    ctx.inplace = inplace and not _saving_is_hooked()
    ctx.save_for_backward(logits, labels, norm, classes)


def _part_nll_autograd(ctx: Any, grad_nll: Tensor) -> tuple[Tensor | None, ...]:
    logits, labels, norm, classes = ctx.saved_tensors
    grad = _logits_gradient(grad_nll, logits, labels, norm, classes, ctx.inplace, ctx.args)
    return grad, None, None, None, None, None, *(None for _ in ctx.args)


part_nll.register_autograd(_part_nll_autograd, setup_context=_part_nll_setup)


@operator(
    "nvamp::linear_part_statistics",
    f"({_HEAD}, ScalarType? accum_dtype, {_OPTIONS}) -> {_STATISTICS}",
)
def linear_part_statistics(*args: Any) -> Tensors:
    head, (backend, opt) = Head(*args[:4]), _backend(args[5:])
    if not len(head.weight):
        return _of_no_class(head.hidden, head.labels)
    with _as_is(head.hidden):
        return linear.part_statistics(backend, head, args[4], opt)


@linear_part_statistics.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Any, labels: Tensor, *args: Any) -> Tensors:
    return _fake_statistics(hidden, labels)


@operator(
    "nvamp::linear_part_nll",
    f"({_HEAD}, {_WHOLE}, ScalarType? accum_dtype, {_OPTIONS}) -> Tensor",
)
def linear_part_nll(*args: Any) -> Tensor:
    return cast(Tensor, args[5].clone())


@linear_part_nll.register_fake
def _(*args: Any) -> Tensor:
    return torch.empty_like(args[5])


def _linear_part_nll_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.args = inputs[7:]
    ctx.save_for_backward(inputs[4], inputs[6], *inputs[:4])


def _linear_part_nll_autograd(ctx: Any, grad_nll: Tensor) -> tuple[Tensor | None, ...]:
    needs = Needs(*ctx.needs_input_grad[:3])
    grads = linear_token_nll_backward(grad_nll, *ctx.saved_tensors, *needs, *ctx.args)
    return *_present(grads, needs), None, None, None, None, *(None for _ in ctx.args)


linear_part_nll.register_autograd(_linear_part_nll_autograd, setup_context=_linear_part_nll_setup)
