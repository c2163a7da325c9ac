"""The engine: losses of single tokens, differentiable in the weight that each token gets.

Two primitives, `token_nll` from logits and `linear_token_nll` from hidden states; `linear_nll_sum` is the
latter for objectives that give all tokens the same weight, and a few of them an extra one.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast, overload

import torch
from torch import Tensor
from typing_extensions import Unpack

from nvamp.engine import ops, parts, reference
from nvamp.engine.backends import backend_for
from nvamp.engine.checks import (
    check_accum_dtype,
    check_class_weight,
    check_head,
    check_labels,
    check_linear,
    check_logits,
    check_transforms,
)
from nvamp.engine.options import Head, Needs, Options, accumulate_dtype
from nvamp.options import (
    DECLARED,
    EngineOptions,
    LinearNLLOptions,
    LinearSumOptions,
    NLLOptions,
    TokenOptions,
    check_ignore_index,
    check_options,
    spelled_out,
)
from nvamp.ranks import UNKNOWN, Ranks, Term

if TYPE_CHECKING:
    from nvamp.distributed import Group


class TokenMetrics(NamedTuple):
    """What a pass over the logits finds out about each token beside its loss, shaped like the labels.

    The prediction is softmax(z), with the z of `TokenOptions`. Only the entropy has a gradient.
    """

    correct: Tensor  # bool: the prediction is the label; False if ignored
    prediction: Tensor  # int64: the class of the largest z, the first of equals; 0 if ignored
    entropy: Tensor  # nats, differentiable with any weight per token; 0 if ignored
    lse: Tensor  # logsumexp(z); 0 if ignored
    mean_logit: Tensor | None = None  # mean of z over the classes; 0 if ignored; None unless asked for


@overload
def token_nll(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = ...,
    return_metrics: Literal[False] = ...,
    **options: Unpack[NLLOptions],
) -> Tensor: ...
@overload
def token_nll(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = ...,
    return_metrics: Literal[True],
    mean_logit: bool = ...,
    **options: Unpack[NLLOptions],
) -> tuple[Tensor, TokenMetrics]: ...
@spelled_out(NLLOptions)
def token_nll(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    return_metrics: bool = False,
    mean_logit: bool = False,
    **options: Unpack[NLLOptions],
) -> Tensor | tuple[Tensor, TokenMetrics]:
    """Negative log-likelihood of every label, `logsumexp(logits) − logits[label]`, in nats.

    The result is differentiable with respect to the logits with any weight per token, at the memory of one
    gradient: a loss of your own is arithmetic on it.

    Args:
        logits: [..., V], float16, bfloat16, float32 or float64, of any strides. Ignored rows may hold
            anything.
        labels: [...] int64, int32 or uint8, in [0, V) or `ignore_index`, for the logits at the same place:
            nothing is shifted here.
        ignore_index: the label of tokens that do not count: loss and gradient are 0.
        return_metrics: also return `TokenMetrics`, from the same pass.
        mean_logit: with `return_metrics`, have the mean of the logits of each token among them.
        inplace_backward: let the backward write the gradient over the logits, which saves the memory of a
            gradient. If another backward needs the logits, PyTorch raises its error for a tensor modified in
            place. The option has no effect on logits that are leaves, views of leaves or DTensors or that
            overlap themselves, with `retain_graph=True`, if saved tensors are hooked, as under activation
            checkpointing, under `torch.compile`, and on `"reference"`.
        class_weight: [V], floating-point, without gradient: how much each class counts, in the loss of a
            token as `torch.nn.CrossEntropyLoss(weight=..., reduction="none")` defines it; see `TokenOptions`.
            With `label_smoothing` too, `"chunked"` does the work of `"triton"`.
        vocab_group: the ranks that share the vocabulary. Each has the logits of some classes, in the order of
            the ranks; the labels and the `class_weight` are those of the whole vocabulary, the same on all
            ranks. The losses are then the same on all ranks too, and each rank gets the gradient with respect
            to its own logits. It takes three all-reduces of at most three numbers a token. Logits that are a
            DTensor sharded over the last dimension need no `vocab_group`.
        backend: `"triton"`, `"chunked"`, `"reference"`, or `None` for the best one of the device.
        **options: see `TokenOptions`.

    Returns:
        [...] in float32, or float64 for float64 logits.

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: a shape, device or option that does not fit, and on a CPU a label out of range. On other
            devices, where a check would wait for the device, such a label gives a loss and a gradient of NaN.
    """
    o = cast(NLLOptions, check_options(NLLOptions, options, "token_nll"))
    metrics = _wanted(return_metrics, mean_logit)
    vocab_group = o["vocab_group"]
    if parts.has_dtensors(logits, labels):
        from nvamp.dtensors import local_logits  # only here: PyTorch can be built without it

        logits, labels, vocab_group, _ = local_logits(logits, labels, vocab_group)
    check_logits(logits, part=vocab_group is not None)
    labels = check_labels(labels, logits, "logits")
    opt = _opt(ignore_index, o, logits, None if vocab_group is not None else logits.shape[-1])
    name = _backend(logits, o)
    check_transforms(name, logits)
    if vocab_group is not None:
        results = _together(
            vocab_group,
            labels,
            logits.dtype,
            metrics,
            opt,
            lambda ranks: parts.token_nll(logits, labels, metrics, o["inplace_backward"], name, opt, ranks),
        )
    elif name == "reference":
        results = reference.token_nll(logits, labels, metrics, opt)
    elif name == "chunked" and not (metrics or o["inplace_backward"]) and ops.are_few(logits, labels):
        results = ops.few_token_nll(logits, labels, opt)
    else:
        results = ops.token_nll(logits, labels, metrics, o["inplace_backward"], name, opt)
        results = _with_lse(metrics, *results)
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
    **options: Unpack[LinearNLLOptions],
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
    mean_logit: bool = ...,
    **options: Unpack[LinearNLLOptions],
) -> tuple[Tensor, TokenMetrics]: ...
@spelled_out(LinearNLLOptions)
def linear_token_nll(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    return_metrics: bool = False,
    mean_logit: bool = False,
    **options: Unpack[LinearNLLOptions],
) -> Tensor | tuple[Tensor, TokenMetrics]:
    """`token_nll(hidden @ weight.T + bias, labels)`, with one chunk of the logits in memory at a time.

    The backward computes the logits again. That makes four matrix products, fewer if an input needs no
    gradient. Under autocast the inputs are cast as `torch.nn.functional.linear` casts them.

    Args:
        hidden: [..., D], the last hidden states.
        weight: [V, D], the weight of the output layer, in the dtype of `hidden`.
        labels: [...] int64, int32 or uint8, in [0, V) or `ignore_index`, for the hidden state at the same
            place.
        bias: [V] or None.
        accum_dtype: the dtype in which the gradient of the weight is added up over the chunks: float32, or
            the weight's own, which saves memory and rounds at every chunk. The default is float32 on an
            accelerator, and on a CPU if there are many chunks.
        vocab_group: the ranks that share the weight and the bias. Each has the rows of some classes, in the
            order of the ranks; hidden and labels are the same on all ranks. A weight that is a DTensor
            sharded over its rows counts as shared if `hidden` is a replicated DTensor. If `hidden` is plain,
            every rank has its own, as under FSDP, and the weight is gathered; see docs/distributed.md.
        reduce_grad_hidden: with `vocab_group`, sum the gradient of `hidden` over the ranks, which takes
            another all-reduce. Give `False` if that is done elsewhere, as in a reduce-scatter of a sequence.

    The other arguments, the result and the errors are those of `token_nll`.
    """
    o = cast(LinearNLLOptions, check_options(LinearNLLOptions, options, "linear_token_nll"))
    metrics = _wanted(return_metrics, mean_logit)
    vocab_group, accum_dtype = o["vocab_group"], o["accum_dtype"]
    if parts.has_dtensors(hidden, weight, labels, bias):
        from nvamp.dtensors import local_head

        parts_of = local_head(hidden, weight, labels, bias, vocab_group)
        hidden, weight, labels, bias, vocab_group, _ = parts_of
    head = _head(hidden, weight, labels, bias, part=vocab_group is not None)
    check_accum_dtype(accum_dtype, head.weight)
    opt = _opt(ignore_index, o, head.hidden, None if vocab_group is not None else len(head.weight))
    name = _backend(hidden, o)
    check_transforms(name, *head[:3])
    if vocab_group is not None:
        if o["reduce_grad_hidden"]:
            from nvamp.distributed import map_gradient, ranks_of

            head = head._replace(hidden=map_gradient(head.hidden, ranks_of(vocab_group).total))
        results = _together(
            vocab_group,
            head.labels,
            head.hidden.dtype,
            metrics,
            opt,
            lambda ranks: parts.linear_token_nll(head, metrics, accum_dtype, name, opt, ranks),
        )
    elif name == "reference":
        logits = reference.logits_of(head, ignore_index)
        results = reference.token_nll(logits, head.labels, metrics, opt)
    else:
        results = ops.linear_token_nll(head, metrics, accum_dtype, name, opt)
        results = _with_lse(metrics, *results)
    return _result(labels, ignore_index, *results)


def _together(
    vocab_group: "Group",
    labels: Tensor,
    dtype: torch.dtype,
    metrics: int,
    opt: Options,
    losses: Callable[[Ranks], tuple[Tensor, ...]],
) -> tuple[Tensor, ...]:
    """losses(ranks of the vocabulary). If it raises, this rank first makes its other exchanges, with NaN."""
    from nvamp.distributed import exchange_of

    terms: dict[str, Term] = {"the number of tokens": UNKNOWN}
    if not torch.compiler.is_compiling():
        given = opt._asdict() | {"class_weight": opt.class_weight is not None}  # it may be on a device
        wanted = {"return_metrics": metrics > 0, "mean_logit": metrics > 2}
        options = ", ".join(f"{name}={value}" for name, value in (given | wanted).items())
        terms = {"the number of tokens": labels.numel(), "the dtype": str(dtype), "options": options}
    exchange = exchange_of(vocab_group, terms, tuple(terms.values()))
    try:
        return losses(exchange.ranks)
    except Exception:
        if exchange.in_step:
            parts.take_part(labels, accumulate_dtype(dtype), metrics, opt, exchange.rest())
        raise


def can_one_pass(hidden: Tensor, weight: Tensor, bias: Tensor | None, backend: str | None) -> bool:
    """Whether `linear_nll_sum` is of use: a gradient is needed, in a dtype with room for it.

    The gradient of a sum over a whole batch overflows float16.
    """
    inputs = [t for t in (hidden, weight, bias) if t is not None]
    differentiated = torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
    half = _autocast_dtype(hidden) == torch.float16
    return differentiated and not half and backend_for(hidden, backend) != "reference"


@overload
def linear_nll_sum(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = ...,
    *,
    few: int,
    ignore_index: int = ...,
    return_metrics: Literal[False] = ...,
    **options: Unpack[LinearSumOptions],
) -> tuple[Tensor, Tensor]: ...
@overload
def linear_nll_sum(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = ...,
    *,
    few: int,
    ignore_index: int = ...,
    return_metrics: Literal[True],
    **options: Unpack[LinearSumOptions],
) -> tuple[Tensor, Tensor, TokenMetrics]: ...
def linear_nll_sum(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    few: int,
    ignore_index: int = -100,
    return_metrics: bool = False,
    **options: Unpack[LinearSumOptions],
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, TokenMetrics]:
    """The sum of the losses, and the losses [...]; the gradient of the sum is taken in the forward.

    This takes three matrix products instead of the four of `linear_token_nll`, but holds the gradients of
    `hidden` and `weight` until the backward, and limits the weights of single losses:

    Args:
        few: how many rows at most may have a gradient with respect to their losses. 0: none. 1: only the
            largest loss, the first if tied; its row is kept. More: any rows; the backward computes their
            logits again and adds their part to the gradient of the weight, two products of that many rows.
            Outside a CPU, rows beyond the `few` largest gradients by magnitude are silently dropped.
        return_metrics: also return `TokenMetrics`, here without gradient, from one more look at each chunk of
            logits.

    The other arguments and the errors are those of `linear_token_nll`; `"reference"` does not have it.
    """
    o = cast(LinearSumOptions, check_options(LinearSumOptions, options, "linear_nll_sum"))
    head, accum_dtype = _head(hidden, weight, labels, bias), o["accum_dtype"]
    check_accum_dtype(accum_dtype, head.weight)
    if few < 0:
        raise ValueError(f"few must be at least 0, got {few}")
    opt = _opt(ignore_index, o, head.hidden, len(head.weight))
    needs = Needs(*(t is not None and t.requires_grad for t in head[:3]))
    name = _backend(hidden, o)
    check_transforms(name, *head[:3])
    wanted = _wanted(return_metrics, mean_logit=False)
    total, *tokens = ops.linear_nll_sum(head, needs, few, wanted, True, accum_dtype, name, opt)[:6]
    found = _result(labels, ignore_index, *_with_lse(wanted, *tokens))
    return (total, found) if isinstance(found, Tensor) else (total, *found)


def _opt(ignore_index: int, o: EngineOptions, x: Tensor, vocab: int | None) -> Options:
    """The checked options of the loss of a token, as operators take them, for x, the logits or hidden states.

    `vocab` is None if x is a part of the vocabulary, whose size is not known yet.
    """
    token_options: Any = {name: o[name] for name in DECLARED[TokenOptions]}  # type: ignore[literal-required]
    class_weight = o["class_weight"]
    if class_weight is not None:
        if class_weight.device != x.device:
            raise ValueError(
                f"class_weight must be on the device of the labels, {x.device}, got {class_weight.device}"
            )
        if vocab is not None:
            check_class_weight(class_weight, vocab)
        class_weight = class_weight.to(accumulate_dtype(x.dtype))
    ignore_index = check_ignore_index("ignore_index", ignore_index)
    return Options(ignore_index, class_weight=class_weight, **token_options)


def _backend(x: Tensor, o: EngineOptions) -> str:
    """The name of the backend for x. The kernels of `"triton"` do not add up what weighs differently."""
    name = backend_for(x, o["backend"])
    return "chunked" if name == "triton" and o["class_weight"] is not None and o["label_smoothing"] else name


def _wanted(return_metrics: bool, mean_logit: bool) -> int:
    """How many metrics are wanted, as `Backend.token_nll` takes it."""
    if mean_logit and not return_metrics:
        raise ValueError("mean_logit is one of the metrics: it needs return_metrics=True")
    return 2 * return_metrics + mean_logit


def _with_lse(metrics: int, nll: Tensor, norm: Tensor, *found: Tensor) -> tuple[Tensor, ...]:
    """(nll,) or, with `metrics`, (nll, lse) and those that were found."""
    return (nll, norm.sum(-1), *found[:metrics]) if metrics else (nll,)


def _result(
    labels: Tensor, ignore_index: int, nll: Tensor, *metrics: Tensor
) -> Tensor | tuple[Tensor, TokenMetrics]:
    """The losses, shaped like the labels, and `TokenMetrics` if lse, entropy and prediction are given."""
    if not metrics:
        return nll.view(labels.shape)
    nll, lse, entropy, prediction, *mean = (x.view(labels.shape) for x in (nll, *metrics))
    valid = labels != ignore_index
    correct = (prediction == labels) & valid
    return nll, TokenMetrics(correct, prediction, entropy, torch.where(valid, lse, 0), *mean)


def _head(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, part: bool = False) -> Head:
    """The arguments of the linear path: checked, flat, and cast as autocast casts them for `linear`."""
    check_linear(hidden, weight, bias)
    hidden, weight = hidden.to(_autocast_dtype(hidden)), weight.to(_autocast_dtype(weight))
    bias = None if bias is None else bias.to(_autocast_dtype(bias))
    check_head(hidden, weight, bias, part)
    labels = check_labels(labels, hidden, "hidden")
    return Head(hidden.reshape(-1, hidden.shape[-1]), weight, bias, labels.reshape(-1))


def _autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype that x has in a matrix product, with or without autocast."""
    device = x.device.type
    # Not `is_autocast_available`, which PyTorch 2.11 cannot compile.
    on = device != "meta" and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if on and x.dtype != torch.float64 else x.dtype
