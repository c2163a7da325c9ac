"""The engine's operators: what autograd, a compiler and an exporter see of the backends.

nvamp::token_nll             losses from logits; the backward recomputes the softmax
nvamp::linear_token_nll      losses from hidden states; the backward recomputes the logits too: four
                             matrix products, and any weights
nvamp::linear_nll_sum_max    sum and maximum of the losses from hidden states, in three products: the
                             gradient of the sum is made while each chunk of logits is there, and the
                             backward scales it and adds the rank-one gradient of the largest loss
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from nvamp.cross_entropy import chunked
from nvamp.cross_entropy.options import Head, Needs, Options, accumulate_dtype

Tensors = tuple[Tensor, ...]


class Backend(Protocol):
    """What a backend offers. Labels are int32 or int64 and not yet checked.

    Losses, log-sum-exp and the gradients by losses are float32, float64 for float64. Gradients nobody needs
    are empty. Ignored rows may hold anything.
    """

    def token_nll(self, logits: Tensor, labels: Tensor, metrics: bool, opt: Options) -> Tensors:
        """(nll, lse), with `metrics` (nll, lse, entropy, correct), of logits [..., V] of any strides."""

    def token_nll_backward(
        self, grad_nll: Tensor, logits: Tensor, labels: Tensor, lse: Tensor, opt: Options
    ) -> Tensor:
        """Gradient of Σ grad_nll·nll by the logits: contiguous, in their dtype."""

    def linear_token_nll(self, head: Head, metrics: bool, opt: Options) -> Tensors:
        """`token_nll` of the logits of a head."""

    def linear_token_nll_backward(
        self, grad_nll: Tensor, lse: Tensor, head: Head, needs: Needs, opt: Options
    ) -> Tensors:
        """Gradients of Σ grad_nll·nll by hidden, weight and bias, in their dtypes."""

    def linear_unit_gradients(self, head: Head, needs: Needs, opt: Options) -> Tensors:
        """nll, and the gradients of Σ nll by hidden, weight and bias, in their dtypes."""

    def linear_row_gradient(self, row: Head, opt: Options) -> Tensor:
        """Gradient [1, V] of the loss of a single row by its logits."""


BACKENDS: dict[str, Backend] = {"chunked": chunked}

_OPTIONS = (
    "str backend, int ignore_index, float label_smoothing, float z_loss, float? softcap, float logit_scale"
)
_HEAD = "Tensor hidden, Tensor weight, Tensor? bias, Tensor labels"
_NEEDS = "bool needs_hidden, bool needs_weight, bool needs_bias"
_TOKENS = "(Tensor nll, Tensor lse, Tensor entropy, Tensor correct)"
_GRADIENTS = "Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias"


def _backend(args: tuple[Any, ...]) -> tuple[Backend, Options]:
    """The last arguments of every operator."""
    return BACKENDS[args[0]], Options(*args[1:])


def _tokens(nll: Tensor, lse: Tensor, *metrics: Tensor) -> Tensors:
    """Results of an operator that always has four."""
    return nll, lse, *(metrics or (nll.new_empty(0), nll.new_empty(0, dtype=torch.bool)))


def _fake_tokens(x: Tensor, labels: Tensor, metrics: bool) -> Tensors:
    nll = x.new_empty(labels.shape, dtype=accumulate_dtype(x.dtype))
    entropy = torch.empty_like(nll) if metrics else nll.new_empty(0)
    return nll, torch.empty_like(nll), entropy, torch.empty_like(entropy, dtype=torch.bool)


def _fake_gradients(head: Head, needs: Needs) -> Tensors:
    tensors = (head.hidden, head.weight, head.weight[:, 0])
    return tuple(t.new_empty(t.shape if needed else (0,)) for t, needed in zip(tensors, needs, strict=True))


def _as_is(x: Tensor) -> AbstractContextManager[object]:
    """Inside, no autocast: an operator computes in the dtypes that it was given."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


# nvamp::token_nll --------------------------------------------------------------------------------------


@torch.library.custom_op(
    "nvamp::token_nll",
    mutates_args=(),
    schema=f"(Tensor logits, Tensor labels, bool metrics, {_OPTIONS}) -> {_TOKENS}",
)
def token_nll(logits: Tensor, labels: Tensor, metrics: bool, *args: Any) -> Tensors:
    backend, opt = _backend(args)
    return _tokens(*backend.token_nll(logits, labels, metrics, opt))


@token_nll.register_fake
def _(logits: Tensor, labels: Tensor, metrics: bool, *args: Any) -> Tensors:
    return _fake_tokens(logits, labels, metrics)


@torch.library.custom_op(
    "nvamp::token_nll_backward",
    mutates_args=(),
    schema=f"(Tensor grad_nll, Tensor logits, Tensor labels, Tensor lse, {_OPTIONS}) -> Tensor",
)
def token_nll_backward(grad_nll: Tensor, logits: Tensor, labels: Tensor, lse: Tensor, *args: Any) -> Tensor:
    backend, opt = _backend(args)
    return backend.token_nll_backward(grad_nll, logits, labels, lse, opt)


@token_nll_backward.register_fake
def _(grad_nll: Tensor, logits: Tensor, labels: Tensor, lse: Tensor, *args: Any) -> Tensor:
    return logits.new_empty(logits.shape)


def _token_nll_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
    logits, labels, _, *ctx.args = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(logits, labels, output[1])


def _token_nll_autograd(ctx: Any, grad_nll: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    grad = torch.ops.nvamp.token_nll_backward(grad_nll, *ctx.saved_tensors, *ctx.args)
    return grad, None, None, *(None for _ in ctx.args)


token_nll.register_autograd(_token_nll_autograd, setup_context=_token_nll_setup)


# nvamp::linear_token_nll -------------------------------------------------------------------------------


@torch.library.custom_op(
    "nvamp::linear_token_nll", mutates_args=(), schema=f"({_HEAD}, bool metrics, {_OPTIONS}) -> {_TOKENS}"
)
def linear_token_nll(*args: Any) -> Tensors:
    head, metrics, (backend, opt) = Head(*args[:4]), args[4], _backend(args[5:])
    with _as_is(head.hidden):
        return _tokens(*backend.linear_token_nll(head, metrics, opt))


@linear_token_nll.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Any, labels: Tensor, metrics: bool, *args: Any) -> Tensors:
    return _fake_tokens(hidden, labels, metrics)


@torch.library.custom_op(
    "nvamp::linear_token_nll_backward",
    mutates_args=(),
    schema=f"(Tensor grad_nll, Tensor lse, {_HEAD}, {_NEEDS}, {_OPTIONS}) -> ({_GRADIENTS})",
)
def linear_token_nll_backward(grad_nll: Tensor, lse: Tensor, *args: Any) -> Tensors:
    head, needs, (backend, opt) = Head(*args[:4]), Needs(*args[4:7]), _backend(args[7:])
    with _as_is(head.hidden):
        return backend.linear_token_nll_backward(grad_nll, lse, head, needs, opt)


@linear_token_nll_backward.register_fake
def _(grad_nll: Tensor, lse: Tensor, *args: Any) -> Tensors:
    return _fake_gradients(Head(*args[:4]), Needs(*args[4:7]))


def _linear_token_nll_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
    *head, _ = inputs[:5]
    ctx.args = inputs[5:]
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(output[1], *head)


def _linear_token_nll_autograd(ctx: Any, grad_nll: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    needs = Needs(*ctx.needs_input_grad[:3])
    grads = torch.ops.nvamp.linear_token_nll_backward(grad_nll, *ctx.saved_tensors, *needs, *ctx.args)
    return *_present(grads, needs), None, None, *(None for _ in ctx.args)


def _present(grads: Tensors, needs: Needs) -> list[Tensor | None]:
    return [grad if needed else None for grad, needed in zip(grads, needs, strict=True)]


linear_token_nll.register_autograd(_linear_token_nll_autograd, setup_context=_linear_token_nll_setup)


# nvamp::linear_nll_sum_max -----------------------------------------------------------------------------


@torch.library.custom_op(
    "nvamp::linear_nll_sum_max",
    mutates_args=(),
    schema=f"({_HEAD}, {_NEEDS}, bool use_up, {_OPTIONS}) -> (Tensor sum, Tensor max, Tensor nll, "
    f"Tensor max_index, {_GRADIENTS})",
)
def linear_nll_sum_max(*args: Any) -> Tensors:
    """`use_up`: the caller does not look at the gradients, so the backward may finish them in place.

    That saves a copy of the weight. A compiled backward, or one that keeps the graph, leaves them alone.
    """
    head, needs, (backend, opt) = Head(*args[:4]), Needs(*args[4:7]), _backend(args[8:])
    with _as_is(head.hidden):
        nll, *grads = backend.linear_unit_gradients(head, needs, opt)
    if not len(nll):
        zero = nll.new_zeros(())
        return zero, zero.clone(), nll, head.labels.new_zeros((), dtype=torch.int64), *grads
    # Where no row has a label, this is an ignored row: its loss and its gradient are 0.
    index = torch.where(head.labels == opt.ignore_index, -torch.inf, nll).argmax()
    return nll.sum(), nll.gather(0, index[None])[0], nll, index, *grads


@linear_nll_sum_max.register_fake
def _(*args: Any) -> Tensors:
    head, needs = Head(*args[:4]), Needs(*args[4:7])
    nll, *_ = _fake_tokens(head.hidden, head.labels, False)
    scalar = nll.new_empty(())
    index = torch.empty_like(scalar, dtype=torch.int64)
    hidden, weight, bias = _fake_gradients(head, needs)
    return scalar, torch.empty_like(scalar), nll, index, hidden, weight, bias


@torch.library.custom_op(
    "nvamp::linear_nll_sum_max_backward",
    mutates_args=(),
    schema=f"(Tensor grad_sum, Tensor? grad_max, {_GRADIENTS}, Tensor max_index, "
    f"{_HEAD}, {_NEEDS}, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
)
def linear_nll_sum_max_backward(grad_sum: Tensor, grad_max: Tensor | None, *args: Any) -> Tensors:
    return _scale_unit_gradients_(grad_sum, grad_max, *(t.clone() for t in args[:3]), *args[3:])


@linear_nll_sum_max_backward.register_fake
def _(grad_sum: Tensor, grad_max: Tensor | None, *args: Any) -> Tensors:
    return _fake_gradients(Head(*args[4:8]), Needs(*args[8:11]))


def _scale_unit_gradients_(
    grad_sum: Tensor,
    grad_max: Tensor | None,
    grad_hidden: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    max_index: Tensor,
    *args: Any,
) -> Tensors:
    """grad_sum·(unit gradients) + grad_max·(gradients of the largest loss), made in the unit gradients."""
    head, needs, (backend, opt) = Head(*args[:4]), Needs(*args[4:7]), _backend(args[7:])
    for grad in (grad_weight, grad_bias):
        grad.mul_(grad_sum)
    if grad_max is None or not len(head.labels):
        return grad_hidden.mul_(grad_sum), grad_weight, grad_bias
    if needs.hidden:  # its row of the largest loss is the gradient of that loss already
        is_max = torch.arange(len(head.labels), device=max_index.device) == max_index
        grad_hidden.mul_((grad_sum + grad_max * is_max)[:, None])
    if needs.weight or needs.bias:
        at = max_index[None]
        # Where no row has a label, this is one without: it may hold anything, and weighs nothing.
        unlabelled = (head.labels[at] == opt.ignore_index)[:, None]
        row = head._replace(hidden=head.hidden[at].masked_fill(unlabelled, 0), labels=head.labels[at])
        with _as_is(head.hidden):
            grad_row = grad_max * backend.linear_row_gradient(row, opt)
            if needs.weight:
                grad_weight.addmm_(grad_row.T.to(row.hidden.dtype), row.hidden)
            if needs.bias:
                grad_bias += grad_row[0]
    return grad_hidden, grad_weight, grad_bias


def _linear_nll_sum_max_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
    _, _, _, max_index, *grads = output
    ctx.args = inputs[4:7] + inputs[8:]
    ctx.use_up = inputs[7]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[2:])
    ctx.save_for_backward(*grads, max_index, *inputs[:4])


def _linear_nll_sum_max_autograd(
    ctx: Any, grad_sum: Tensor | None, grad_max: Tensor | None, *_: Any
) -> tuple[Tensor | None, ...]:
    if grad_sum is None and grad_max is None:
        return (None,) * (5 + len(ctx.args))
    saved = ctx.saved_tensors  # once: checkpointing allows no second look
    if grad_sum is None:
        grad_sum = saved[0].new_zeros(())
    in_place = ctx.use_up and type(saved[0]) is Tensor and not _graph_is_kept()
    scale = _scale_unit_gradients_ if in_place else torch.ops.nvamp.linear_nll_sum_max_backward
    grads = scale(grad_sum, grad_max, *saved, *ctx.args)
    return *_present(grads, Needs(*ctx.args[:3])), None, None, *(None for _ in ctx.args)


def _graph_is_kept() -> bool:
    """Whether the running backward has `retain_graph=True`; yes where PyTorch does not say."""
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if ask is None else bool(ask())


linear_nll_sum_max.register_autograd(_linear_nll_sum_max_autograd, setup_context=_linear_nll_sum_max_setup)
