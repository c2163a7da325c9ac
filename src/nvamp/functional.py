"""The losses as functions, and the primitives to build others from."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, TypedDict, cast, overload

import torch
from torch import Tensor
from typing_extensions import Unpack

from nvamp import apply
from nvamp.apply import Call, Items, Listener, NVAMPStats, TokenInputs
from nvamp.engine import TokenMetrics, linear_token_nll, token_nll
from nvamp.objectives import NVAMP, Gradient, Objective
from nvamp.options import (
    IGNORE_INDEX,
    LinearOptions,
    LogitsOptions,
    LogprobOptions,
    TokenLossOptions,
    TokenOptions,
    check_ignore_index,
    check_options,
    spelled_out,
)

if TYPE_CHECKING:
    from nvamp.distributed import Group

__all__ = [
    "LinearNVAMPOptions",
    "NVAMPOptions",
    "NVAMPStats",
    "TokenInputs",
    "TokenMetrics",
    "TokenOptions",
    "linear_nvamp_loss",
    "linear_token_nll",
    "logprobs",
    "nvamp_loss",
    "token_nll",
    "token_weights",
]


@overload
def logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = ...,
    *,
    ignore_index: int = ...,
    return_entropy: Literal[False] = ...,
    **options: Unpack[LogprobOptions],
) -> Tensor: ...
@overload
def logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = ...,
    *,
    ignore_index: int = ...,
    return_entropy: Literal[True],
    **options: Unpack[LogprobOptions],
) -> tuple[Tensor, Tensor]: ...
@spelled_out(LogprobOptions)
def logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = IGNORE_INDEX,
    return_entropy: bool = False,
    **options: Unpack[LogprobOptions],
) -> Tensor | tuple[Tensor, Tensor]:
    """The log-probability of every label, without gradient, for passes of a reference or an old policy.

    It takes one matrix product, with one chunk of the logits in memory at a time. `linear_token_nll` gives
    log-probabilities with a gradient.

    Args:
        hidden: [..., D], the last hidden states.
        weight: [V, D], the weight of the output layer, in the dtype of `hidden`.
        labels: [...] int64, int32 or uint8, in [0, V) or `ignore_index`, for the hidden state at the same
            place: nothing is shifted here.
        bias: [V] or None.
        return_entropy: also return the entropies of the predictions, from the same pass.
        softcap, logit_scale: how the model makes logits; see `TokenOptions`.
        temperature: divides these logits, above 0.
        vocab_group, backend: as in `linear_token_nll`, DTensors too.

    Returns:
        [...] in nats, at most 0, and 0 for ignored labels; with `return_entropy` a pair of them and the
        entropies [...] in nats, 0 for ignored labels. Both are in float32, or float64 for float64 inputs.

    Raises:
        TypeError, ValueError: arguments that do not fit; see `token_nll`.

    Example:
        >>> reference = logprobs(hidden[:, :-1], lm_head.weight, tokens[:, 1:], temperature=0.9)
    """
    o = check_options(LogprobOptions, options, "logprobs")
    temperature = cast(float, o.pop("temperature"))
    for name in ("softcap", "logit_scale"):  # a cap of c on logits that are divided later is one of c/T
        o[name] = None if o[name] is None else cast(float, o[name]) / temperature
    with torch.no_grad():
        found = linear_token_nll(  # type: ignore[call-overload]
            hidden, weight, labels, bias, ignore_index=ignore_index, return_metrics=return_entropy, **o
        )
    return (0 - found[0], found[1].entropy) if return_entropy else 0 - found


class _Fields(TypedDict, total=False):
    alpha: float
    beta: float
    gamma: float
    eps: float
    ignore_index: int
    tail: float
    gradient: Gradient


class NVAMPOptions(_Fields, LogitsOptions, total=False):
    """Keyword arguments of `nvamp_loss`: the arguments of `nvamp.NVAMPLoss`, and its `on_stats`."""

    on_stats: Listener | None


class LinearNVAMPOptions(_Fields, LinearOptions, total=False):
    """Keyword arguments of `linear_nvamp_loss`: those of `nvamp.LinearNVAMPLoss`, and its `on_stats`."""

    on_stats: Listener | None


@overload
def nvamp_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    num_items_in_batch: Items = ...,
    return_stats: Literal[False] = ...,
    **options: Unpack[NVAMPOptions],
) -> Tensor: ...
@overload
def nvamp_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    num_items_in_batch: Items = ...,
    return_stats: Literal[True],
    **options: Unpack[NVAMPOptions],
) -> tuple[Tensor, NVAMPStats]: ...
def nvamp_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    num_items_in_batch: Items = None,
    return_stats: bool = False,
    **options: Unpack[NVAMPOptions],
) -> Tensor | tuple[Tensor, NVAMPStats]:
    """`nvamp.NVAMPLoss` as a function, with its options as keyword arguments."""
    objective, ignore_index, on_stats, rest = _parted(options)
    o = cast(LogitsOptions, check_options(LogitsOptions, rest, "nvamp_loss"))
    call = Call(num_items_in_batch, {}, return_stats, on_stats)
    return apply.of_logits(objective, logits, labels, ignore_index, o, call)


@overload
def linear_nvamp_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = ...,
    *,
    num_items_in_batch: Items = ...,
    return_stats: Literal[False] = ...,
    **options: Unpack[LinearNVAMPOptions],
) -> Tensor: ...
@overload
def linear_nvamp_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = ...,
    *,
    num_items_in_batch: Items = ...,
    return_stats: Literal[True],
    **options: Unpack[LinearNVAMPOptions],
) -> tuple[Tensor, NVAMPStats]: ...
def linear_nvamp_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    num_items_in_batch: Items = None,
    return_stats: bool = False,
    **options: Unpack[LinearNVAMPOptions],
) -> Tensor | tuple[Tensor, NVAMPStats]:
    """`nvamp.LinearNVAMPLoss` as a function, with its options as keyword arguments."""
    objective, ignore_index, on_stats, rest = _parted(options)
    o = cast(LinearOptions, check_options(LinearOptions, rest, "linear_nvamp_loss"))
    call = Call(num_items_in_batch, {}, return_stats, on_stats)
    return apply.of_hidden(objective, hidden, weight, labels, bias, ignore_index, o, call)


def _parted(
    options: NVAMPOptions | LinearNVAMPOptions,
) -> tuple[NVAMP, int, Listener | None, Mapping[str, object]]:
    """The objective that options describe, ignore_index, on_stats, and the other options."""
    rest = dict(options)
    fields = {name: rest.pop(name) for name in NVAMP.__dataclass_fields__ if name in rest}
    ignore_index = check_ignore_index("ignore_index", rest.pop("ignore_index", IGNORE_INDEX))
    on_stats = cast("Listener | None", rest.pop("on_stats", None))
    return NVAMP(**fields), ignore_index, on_stats, rest  # type: ignore[arg-type]  # it checks them


def token_weights(
    objective: Objective,
    nll: Tensor,
    valid: Tensor | None = None,
    *,
    entropy: Tensor | None = None,
    num_items_in_batch: Items = None,
    process_group: "Group | None" = None,
    **inputs: Unpack[TokenInputs],
) -> Tensor:
    """The weight `∂L/∂ℓ` that an objective gives each token, from the losses `nll` [...] in nats.

    Given the losses of a first pass without gradient over all micro-batches, it returns the exact weight of
    each token for a second pass that accumulates gradients; see docs/distributed.md.

    Args:
        objective: one of `nvamp.objectives`.
        nll: [...] losses of the tokens.
        valid: [...] bool, which of them count; all by default. The others get 0.
        entropy: [...] entropies of the predictions in nats, if the objective needs them.
        process_group: the ranks that share the batch. The sum of the gradients of all ranks is then the
            gradient of the batch. DDP takes the mean: multiply the weights by the number of ranks.
        **inputs: what the objective needs for each token, shaped like `nll`.

    Returns:
        [...] in float32, or float64 for float64 losses.

    Raises:
        TypeError, ValueError: arguments that do not fit.

    Example:
        >>> weights = token_weights(NVAMP(gradient="token"), nll, labels != -100)
    """
    if not isinstance(objective, Objective):
        raise TypeError(f"objective must be one of nvamp.objectives, such as NVAMP(), got {objective!r}")
    check_options(TokenLossOptions, {"process_group": process_group}, "token_weights")
    call = Call(num_items_in_batch, inputs, False, None)
    return apply.weights_of_tokens(objective, nll, valid, entropy, process_group, call)
