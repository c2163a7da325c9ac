"""The engine: losses of single tokens, differentiable in the weight that each token gets.

Two primitives, `token_nll` from logits and `linear_token_nll` from hidden states; `linear_nll_sum` is the
latter for objectives that give all tokens the same weight, and a few of them an extra one.
"""

from typing import TYPE_CHECKING, Literal, NamedTuple, overload

import torch
from torch import Tensor
from typing_extensions import Unpack

from nvamp.engine import ops, parts, reference
from nvamp.engine.backends import backend_for
from nvamp.engine.checks import (
    check_accum_dtype,
    check_head,
    check_labels,
    check_linear,
    check_logits,
    check_transforms,
)
from nvamp.engine.options import Head, Needs, Options, TokenOptions, checked
from nvamp.ranks import Ranks

if TYPE_CHECKING:
    from nvamp.distributed import Group


class TokenMetrics(NamedTuple):
    """What else a pass over the logits finds out about each token, shaped like the labels.

    All of it is about the prediction, softmax(z) of the z of `TokenOptions`. Only the entropy has a gradient.
    """

    correct: Tensor  # bool: the prediction is the label; False where ignored
    prediction: Tensor  # int64: the class of the largest z, the first of equals; 0 where ignored
    entropy: Tensor  # nats, differentiable with any weight per token; 0 where ignored
    lse: Tensor  # logsumexp(z); 0 where ignored


@overload
def token_nll(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = ...,
    return_metrics: Literal[False] = ...,
    inplace_backward: bool = ...,
    vocab_group: "Group | None" = ...,
    backend: str | None = ...,
    **options: Unpack[TokenOptions],
) -> Tensor: ...
@overload
def token_nll(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = ...,
    return_metrics: Literal[True],
    inplace_backward: bool = ...,
    vocab_group: "Group | None" = ...,
    backend: str | None = ...,
    **options: Unpack[TokenOptions],
) -> tuple[Tensor, TokenMetrics]: ...
def token_nll(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    return_metrics: bool = False,
    inplace_backward: bool = False,
    vocab_group: "Group | None" = None,
    backend: str | None = None,
    **options: Unpack[TokenOptions],
) -> Tensor | tuple[Tensor, TokenMetrics]:
    """Negative log-likelihood of every label, `logsumexp(logits) − logits[label]`, in nats.

    Differentiable by the logits with any weight per token, at the memory of one gradient: a loss of your own
    is arithmetic on the result.

    Args:
        logits: [..., V], float16, bfloat16, float32 or float64, of any strides. Ignored rows may hold
            anything.
        labels: [...] int64 or int32, in [0, V) or `ignore_index`, for the logits at the same place: there is
            no shift here.
        ignore_index: the label of tokens that do not count: loss and gradient are 0.
        return_metrics: also return `TokenMetrics`, from the same pass.
        inplace_backward: let the backward write the gradient over the logits, which saves its memory: after
            it they hold their gradient. Where another backward needs them, PyTorch raises its error of a
            tensor modified in place. No effect on logits that are leaves, views of leaves or DTensors, or
            overlap themselves, with `retain_graph=True`, where saving tensors is hooked, as under activation
            checkpointing, under `torch.compile`, and on `"reference"`.
        vocab_group: the ranks that have the logits together, each those of some classes, in their order;
            labels are of the whole vocabulary, and the same on all of them. So are then the losses, and the
            gradient is that by the rank's own logits. It takes three all-reduces of at most three numbers a
            token. Logits that are a DTensor sharded over its last dimension say so themselves.
        backend: `"triton"`, `"chunked"`, `"reference"`, or `None` for the best one of the device.
        **options: see `TokenOptions`.

    Returns:
        [...] in float32, or float64 for float64 logits.

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: a shape, device or option that does not fit; on a CPU also a label out of range, which on
            other devices, where a look would wait for the device, gives a loss and a gradient of NaN.
    """
    if parts.has_dtensors(logits, labels):
        from nvamp.dtensors import local_logits  # only here: PyTorch can be built without it

        logits, labels, vocab_group = local_logits(logits, labels, vocab_group)
    check_logits(logits, part=vocab_group is not None)
    check_labels(labels, logits, "logits")
    opt = checked(Options(ignore_index, **options))
    name = backend_for(logits, backend)
    check_transforms(name, logits)
    if vocab_group is not None:
        ranks = _ranks_of(vocab_group)
        results = parts.token_nll(logits, labels, return_metrics, inplace_backward, name, opt, ranks)
    elif name == "reference":
        results = reference.token_nll(logits, labels, return_metrics, opt)
    else:
        results = ops.token_nll(logits, labels, return_metrics, inplace_backward, name, opt)
        results = _with_lse(*results) if return_metrics else results[:1]
    return _result(labels, ignore_index, *results)


@overload
def linear_token_nll(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = ...,
    *,
    ignore_index: int = ...,
    return_metrics: Literal[False] = ...,
    accum_dtype: torch.dtype | None = ...,
    vocab_group: "Group | None" = ...,
    reduce_grad_hidden: bool = ...,
    backend: str | None = ...,
    **options: Unpack[TokenOptions],
) -> Tensor: ...
@overload
def linear_token_nll(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = ...,
    *,
    ignore_index: int = ...,
    return_metrics: Literal[True],
    accum_dtype: torch.dtype | None = ...,
    vocab_group: "Group | None" = ...,
    reduce_grad_hidden: bool = ...,
    backend: str | None = ...,
    **options: Unpack[TokenOptions],
) -> tuple[Tensor, TokenMetrics]: ...
def linear_token_nll(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    return_metrics: bool = False,
    accum_dtype: torch.dtype | None = None,
    vocab_group: "Group | None" = None,
    reduce_grad_hidden: bool = True,
    backend: str | None = None,
    **options: Unpack[TokenOptions],
) -> Tensor | tuple[Tensor, TokenMetrics]:
    """`token_nll(hidden @ weight.T + bias, labels)`, with one chunk of the logits in memory at a time.

    The backward computes the logits again: four matrix products in all, less those for inputs that need no
    gradient. Under autocast the inputs are cast as `torch.nn.functional.linear` casts them.

    Args:
        hidden: [..., D], the last hidden states.
        weight: [V, D], that of the output layer, in the dtype of `hidden`.
        labels: [...] int64 or int32, in [0, V) or `ignore_index`, for the hidden state at the same place.
        bias: [V] or None.
        accum_dtype: in which the gradients by the weight of the chunks are added up: float32, or that of the
            weight, which saves memory and rounds at every chunk. By default float32 on an accelerator, and on
            a CPU where there are many chunks.
        vocab_group: the ranks that have the weight and the bias together, each the rows of some classes, in
            their order; hidden and labels are the same on all of them. A weight that is a DTensor sharded
            over its rows is taken so where `hidden` is a replicated DTensor. With plain `hidden`, which every
            rank has of its own, it is gathered, as under FSDP; see docs/distributed.md.
        reduce_grad_hidden: with `vocab_group`, add up the gradients by `hidden` of its ranks, which is
            another all-reduce; `False` for who does that elsewhere, as in a reduce-scatter of a sequence.

    The other arguments, the result and the errors are those of `token_nll`.
    """
    if parts.has_dtensors(hidden, weight, labels, bias):
        from nvamp.dtensors import local_head

        hidden, weight, labels, bias, vocab_group = local_head(hidden, weight, labels, bias, vocab_group)
    head = _head(hidden, weight, labels, bias, part=vocab_group is not None)
    check_accum_dtype(accum_dtype, head.weight)
    opt = checked(Options(ignore_index, **options))
    name = backend_for(hidden, backend)
    check_transforms(name, *head[:3])
    if vocab_group is not None:
        ranks = _ranks_of(vocab_group)
        if reduce_grad_hidden:
            from nvamp.distributed import map_gradient

            head = head._replace(hidden=map_gradient(head.hidden, ranks.total))
        results = parts.linear_token_nll(head, return_metrics, accum_dtype, name, opt, ranks)
    elif name == "reference":
        logits = reference.logits_of(head, ignore_index)
        results = reference.token_nll(logits, head.labels, return_metrics, opt)
    else:
        results = ops.linear_token_nll(head, return_metrics, accum_dtype, name, opt)
        results = _with_lse(*results) if return_metrics else results[:1]
    return _result(labels, ignore_index, *results)


def _ranks_of(vocab_group: "Group") -> Ranks:
    from nvamp.distributed import check_group, ranks_of

    check_group("vocab_group", vocab_group)
    return ranks_of(vocab_group)


def can_one_pass(hidden: Tensor, weight: Tensor, bias: Tensor | None, backend: str | None) -> bool:
    """Whether `linear_nll_sum` is of use: there is a gradient to take, in a dtype with room for it.

    The gradient of a sum over a whole batch overflows float16.
    """
    inputs = [t for t in (hidden, weight, bias) if t is not None]
    differentiated = torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
    half = _autocast_dtype(hidden) == torch.float16
    return differentiated and not half and backend_for(hidden, backend) != "reference"


def linear_nll_sum(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    few: int,
    ignore_index: int = -100,
    accum_dtype: torch.dtype | None = None,
    backend: str | None = None,
    **options: Unpack[TokenOptions],
) -> tuple[Tensor, Tensor]:
    """The sum of the losses, and the losses [...]; the gradient of the sum is taken in the forward.

    So it takes three matrix products in place of the four of `linear_token_nll`, for holding the gradients of
    `hidden` and `weight` until the backward. What a backward may ask of the losses is limited:

    Args:
        few: the gradient by the losses is 0 but for at most so many rows. 0: the losses have no gradient.
            1: it is that of the largest loss, the first if tied, whose row is kept. More: any rows; the
            backward computes their logits again and adds their part of the gradient of the weight, two
            products of as many rows. Elsewhere than on a CPU the rows beyond the first `few`, by magnitude,
            are not looked for.

    The other arguments and the errors are those of `linear_token_nll`; there is no `"reference"` of it.
    """
    head = _head(hidden, weight, labels, bias)
    check_accum_dtype(accum_dtype, head.weight)
    if few < 0:
        raise ValueError(f"few must be at least 0, got {few}")
    opt = checked(Options(ignore_index, **options))
    needs = Needs(*(t is not None and t.requires_grad for t in head[:3]))
    name = backend_for(hidden, backend)
    check_transforms(name, *head[:3])
    total, nll, *_ = ops.linear_nll_sum(head, needs, few, True, accum_dtype, name, opt)
    return total, nll.view(labels.shape)


def _with_lse(nll: Tensor, norm: Tensor, entropy: Tensor, prediction: Tensor) -> tuple[Tensor, ...]:
    return nll, norm.sum(-1), entropy, prediction


def _result(
    labels: Tensor, ignore_index: int, nll: Tensor, *metrics: Tensor
) -> Tensor | tuple[Tensor, TokenMetrics]:
    """Shaped like the labels: the losses and, if there are lse, entropy and prediction, these as metrics."""
    if not metrics:
        return nll.view(labels.shape)
    nll, lse, entropy, prediction = (x.view(labels.shape) for x in (nll, *metrics))
    valid = labels != ignore_index
    correct = (prediction == labels) & valid
    return nll, TokenMetrics(correct, prediction, entropy, torch.where(valid, lse, 0))


def _head(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, part: bool = False) -> Head:
    """The arguments of the linear path: checked, flat, and cast as autocast casts those of `linear`."""
    check_linear(hidden, weight, bias)
    hidden, weight = hidden.to(_autocast_dtype(hidden)), weight.to(_autocast_dtype(weight))
    bias = None if bias is None else bias.to(_autocast_dtype(bias))
    check_head(hidden, weight, bias, part)
    check_labels(labels, hidden, "hidden")
    return Head(hidden.reshape(-1, hidden.shape[-1]), weight, bias, labels.reshape(-1))


def _autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype that x has in a matrix product, where autocast may be on."""
    device = x.device.type
    # Not `is_autocast_available`, which PyTorch 2.11 cannot compile.
    on = device != "meta" and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if on and x.dtype != torch.float64 else x.dtype
