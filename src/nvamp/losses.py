"""The losses as modules: any objective, from logits, hidden states, or losses computed elsewhere."""

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Generic, Literal, TypeVar, cast, overload

import torch
from torch import Tensor, nn
from typing_extensions import Self, Unpack

from nvamp import apply
from nvamp.apply import Call, Items, Listener, NVAMPStats, TokenInputs
from nvamp.objectives import NVAMP, Gradient, Objective
from nvamp.options import (
    DECLARED,
    IGNORE_INDEX,
    LinearOptions,
    LogitsOptions,
    TokenLossOptions,
    check_ignore_index,
    check_names,
    spelled_out,
)

if TYPE_CHECKING:
    from nvamp.distributed import Group

T = TypeVar("T")


class _Criterion(nn.Module):
    """An objective, and how the losses of the tokens are computed. Both may be changed at any time."""

    objective: Objective
    on_stats: Listener | None
    process_group: "Group | None"
    _declared: ClassVar[type]  # the options that this criterion has
    _objective: ClassVar[type[Objective]] = Objective  # the objectives that it takes

    def __init__(self, objective: Objective, options: Mapping[str, object]) -> None:
        super().__init__()
        self.objective = objective
        self.on_stats = None
        check_names(self._declared, options, type(self).__name__)
        for name, option in DECLARED[self._declared].items():
            setattr(self, name, options.get(name, option.default))

    def __setattr__(self, name: str, value: object) -> None:
        """Checks an option before it is kept, so that a wrong one fails where it is set."""
        if name in DECLARED[self._declared]:
            value = DECLARED[self._declared][name].check(name, value)
            if name == "class_weight" and name not in self._buffers:
                self.register_buffer(name, None, persistent=False)  # moves to a device with the module
        elif name == "ignore_index":
            value = check_ignore_index(name, value)
        elif name == "objective" and not isinstance(value, self._objective):
            kind = "one of nvamp.objectives, such as" if self._objective is Objective else "an"
            raise TypeError(f"objective must be {kind} NVAMP(), got {value!r}")
        elif name == "on_stats" and value is not None and not callable(value):
            raise TypeError(f"on_stats must be callable or None, got {value!r}")
        elif not hasattr(type(self), name) and hasattr(self.__dict__.get("objective"), name):
            raise AttributeError(
                f"{name} is an option of the objective: assign criterion.objective, for example "
                f"dataclasses.replace(criterion.objective, {name}={value!r})"
            )
        super().__setattr__(name, cast("Tensor | nn.Module", value))

    def __deepcopy__(self, memo: dict[int, object]) -> Self:
        """A copy with the same groups and listener: groups belong to the process and cannot be copied."""
        kept = ("process_group", "vocab_group", "on_stats")
        memo |= {id(shared): shared for shared in map(self.__dict__.get, kept)}
        new = self.__class__.__new__(self.__class__)
        memo[id(self)] = new
        new.__dict__ = copy.deepcopy(self.__dict__, memo)
        return new

    def __setstate__(self, state: dict[str, object]) -> None:
        """Restores a criterion that may have been saved before some option existed."""
        buffers = cast(dict[str, object], state.get("_buffers", {}))  # which an attribute would hide
        declared = DECLARED[self._declared].items()
        defaults = {name: option.default for name, option in declared if name not in buffers}
        super().__setstate__({"on_stats": None, **defaults, **state})  # type: ignore[no-untyped-call]

    def extra_repr(self) -> str:
        declared = DECLARED[self._declared]
        values = {name: (getattr(self, name), option.default) for name, option in declared.items()}
        if "ignore_index" in self.__dict__:
            values = {"ignore_index": (self.__dict__["ignore_index"], IGNORE_INDEX), **values}
        changed = [f"{name}={value!r}" for name, (value, default) in values.items() if value != default]
        return ", ".join([self._objective_repr(), *changed])

    def _objective_repr(self) -> str:
        return repr(self.objective)

    def _call(self, items: Items, inputs: TokenInputs, return_stats: bool = False) -> Call:
        return Call(items, inputs, return_stats, self.on_stats)


class _TokenCriterion(_Criterion):
    """A criterion that computes the losses of the tokens itself."""

    ignore_index: int
    shift: bool
    label_smoothing: float
    z_loss: float
    softcap: float | None
    logit_scale: float
    class_weight: Tensor | None
    vocab_group: "Group | None"
    backend: str | None
    token_metrics: bool = False

    def _call(self, items: Items, inputs: TokenInputs, return_stats: bool = False) -> Call:
        return super()._call(items, inputs, return_stats)._replace(metrics=self.token_metrics)

    def _of_logits(self, logits: Tensor, labels: Tensor, call: Call, **changed: object) -> apply.Loss:
        """The loss of logits; `changed` replaces options for this call."""
        options = cast(LogitsOptions, self._options(LogitsOptions) | changed)
        return apply.of_logits(self.objective, logits, labels, self.ignore_index, options, call)

    def _options(self, of: type) -> dict[str, object]:
        """The options of the class `of`, with the default for an option that this criterion does not have."""
        return {name: getattr(self, name, option.default) for name, option in DECLARED[of].items()}


class Loss(_TokenCriterion):
    """The loss of logits under an objective.

    Args:
        objective: one of `nvamp.objectives`, which turns the losses of the tokens into one number.
        ignore_index: the label of tokens that do not count.
        shift: score position t against label t+1, as causal language models need; `False` for labels that are
            shifted already.
        label_smoothing, z_loss, softcap, logit_scale: the loss of a token; see
            `nvamp.functional.TokenOptions`.
        class_weight: [vocab], how much each class counts; see `nvamp.functional.token_nll`. It is a buffer,
            which moves with the module and is not in its `state_dict`. The loss of the batch is not divided
            by the sum of weights, as that of `torch.nn.CrossEntropyLoss` is: `num_items_in_batch` does that.
        inplace_backward: let the backward overwrite the logits; see `nvamp.functional.token_nll`.
        process_group: the ranks that share the batch, a `ProcessGroup` or a `DeviceMesh` of one dimension.
            Every rank gets the loss of the whole batch. The mean of the gradients over the ranks, which DDP
            and FSDP take, is the gradient of the whole batch; see docs/distributed.md.
        vocab_group: the tensor-parallel ranks that share the vocabulary, each with a part of it; see
            `nvamp.functional.token_nll`.
        backend: the engine's backend, "triton", "chunked" or "reference"; `None` for the best on the device.

    Attributes:
        on_stats: if set, called with the `NVAMPStats` of every loss. It gives access to the statistics of a
            loss that a trainer or a model computes, as in `nvamp.integrations.stats.log_stats`.
        token_metrics: if True, the statistics include `accuracy` and `entropy`, from the same pass over the
            logits: one more look at them, and with a `process_group` one more all-reduce of three numbers.

    All arguments are attributes too, and may be changed between calls.

    Raises:
        TypeError, ValueError: an option of another type, or out of range.

    Example:
        >>> criterion = Loss(Focal(gamma=2), label_smoothing=0.1)
        >>> loss = criterion(logits, labels)
    """

    _declared = LogitsOptions
    inplace_backward: bool

    @spelled_out(LogitsOptions)
    def __init__(
        self, objective: Objective, ignore_index: int = IGNORE_INDEX, **options: Unpack[LogitsOptions]
    ) -> None:
        super().__init__(objective, options)
        self.ignore_index = ignore_index

    def forward(
        self,
        logits: Tensor,
        labels: Tensor,
        num_items_in_batch: Items = None,
        *,
        return_stats: bool = False,
        **inputs: Unpack[TokenInputs],
    ) -> Tensor | tuple[Tensor, NVAMPStats]:
        """The loss, a scalar in float32 (float64 for float64 logits), in nats.

        Args:
            logits: [batch, seq, vocab], or any [..., seq, vocab], of any floating dtype and strides.
            labels: [batch, seq] int64, int32 or uint8; each in [0, vocab) or `ignore_index`.
            num_items_in_batch: the number of tokens in the whole optimizer step, so that the losses of its
                micro-batches add up. The default is the number in this call.
            return_stats: return `(loss, NVAMPStats)`.
            **inputs: what the objective needs for each token, `token_weight` for example, shaped like the
                labels; see `nvamp.functional.TokenInputs`.

        Raises:
            TypeError, ValueError: arguments that do not fit; see `nvamp.functional.token_nll`.
        """
        return self._of_logits(logits, labels, self._call(num_items_in_batch, inputs, return_stats))

    if TYPE_CHECKING:

        @overload
        def __call__(
            self,
            logits: Tensor,
            labels: Tensor,
            num_items_in_batch: Items = ...,
            *,
            return_stats: Literal[False] = ...,
            **inputs: Unpack[TokenInputs],
        ) -> Tensor: ...
        @overload
        def __call__(
            self,
            logits: Tensor,
            labels: Tensor,
            num_items_in_batch: Items = ...,
            *,
            return_stats: Literal[True],
            **inputs: Unpack[TokenInputs],
        ) -> tuple[Tensor, NVAMPStats]: ...
        def __call__(self, *args: object, **kwargs: object) -> object: ...


class LinearLoss(_TokenCriterion):
    """`Loss` of `hidden @ weight.T + bias`, without ever holding all logits.

    Three matrix products are enough for an objective that gives all tokens the same weight, except a few: the
    forward computes the gradients. Cross-entropy, `Tail`, and NVAMP with `gradient` "scalar" or "detached"
    are of this kind. All other objectives take four, because the backward computes the logits again. So do a
    `vocab_group` and float16, in which the gradient of a sum could overflow.

    Args:
        accum_dtype: the dtype in which the gradient of the weight is added up; see
            `nvamp.functional.linear_token_nll`.
        reduce_grad_hidden: with `vocab_group`; see `nvamp.functional.linear_token_nll`.

    The other arguments, attributes and errors are those of `Loss`.

    Example:
        >>> loss = LinearLoss(Tail(share=0.05))(hidden, lm_head.weight, labels)
    """

    _declared = LinearOptions
    accum_dtype: torch.dtype | None
    reduce_grad_hidden: bool

    @spelled_out(LinearOptions)
    def __init__(
        self, objective: Objective, ignore_index: int = IGNORE_INDEX, **options: Unpack[LinearOptions]
    ) -> None:
        super().__init__(objective, options)
        self.ignore_index = ignore_index

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        bias: Tensor | None = None,
        *,
        num_items_in_batch: Items = None,
        return_stats: bool = False,
        **inputs: Unpack[TokenInputs],
    ) -> Tensor | tuple[Tensor, NVAMPStats]:
        """The loss, a scalar; other arguments and the errors are as in `Loss`.

        Args:
            hidden: [batch, seq, features], the last hidden states.
            weight: [vocab, features], the weight of the output layer.
            labels: [batch, seq].
            bias: [vocab] or None.
        """
        call = self._call(num_items_in_batch, inputs, return_stats)
        return self._of_hidden(hidden, weight, labels, bias, call)

    def _of_hidden(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        bias: Tensor | None,
        call: Call,
        **changed: object,
    ) -> apply.Loss:
        """The loss; `changed` replaces options for this call."""
        options = cast(LinearOptions, self._options(LinearOptions) | changed)
        return apply.of_hidden(self.objective, hidden, weight, labels, bias, self.ignore_index, options, call)

    if TYPE_CHECKING:

        @overload
        def __call__(
            self,
            hidden: Tensor,
            weight: Tensor,
            labels: Tensor,
            bias: Tensor | None = ...,
            *,
            num_items_in_batch: Items = ...,
            return_stats: Literal[False] = ...,
            **inputs: Unpack[TokenInputs],
        ) -> Tensor: ...
        @overload
        def __call__(
            self,
            hidden: Tensor,
            weight: Tensor,
            labels: Tensor,
            bias: Tensor | None = ...,
            *,
            num_items_in_batch: Items = ...,
            return_stats: Literal[True],
            **inputs: Unpack[TokenInputs],
        ) -> tuple[Tensor, NVAMPStats]: ...
        def __call__(self, *args: object, **kwargs: object) -> object: ...


class TokenLoss(_Criterion):
    """`Loss` of per-token losses computed elsewhere, for example by a trainer's own fused head.

    Args:
        objective: one of `nvamp.objectives`, which turns the losses of the tokens into one number.
        process_group: as in `Loss`.

    Example:
        >>> loss = TokenLoss(DFT())(-logprobs, labels != -100)
    """

    _declared = TokenLossOptions

    @spelled_out(TokenLossOptions)
    def __init__(self, objective: Objective, **options: Unpack[TokenLossOptions]) -> None:
        super().__init__(objective, options)

    def forward(
        self,
        nll: Tensor,
        valid: Tensor | None = None,
        num_items_in_batch: Items = None,
        *,
        entropy: Tensor | None = None,
        return_stats: bool = False,
        **inputs: Unpack[TokenInputs],
    ) -> Tensor | tuple[Tensor, NVAMPStats]:
        """The loss, a scalar in float32 (float64 for float64 losses), in nats.

        Args:
            nll: [...] losses of the tokens in nats, with their gradient.
            valid: [...] bool, which of them count; all by default. The others may hold anything.
            entropy: [...] entropies of the predictions in nats, with their gradient, if the objective needs
                them.
            num_items_in_batch, return_stats, inputs: as in `Loss`; inputs are shaped like `nll`.

        Raises:
            TypeError, ValueError: arguments that do not fit.
        """
        call = self._call(num_items_in_batch, inputs, return_stats)
        return apply.of_tokens(self.objective, nll, valid, entropy, self.process_group, call)

    if TYPE_CHECKING:

        @overload
        def __call__(
            self,
            nll: Tensor,
            valid: Tensor | None = ...,
            num_items_in_batch: Items = ...,
            *,
            entropy: Tensor | None = ...,
            return_stats: Literal[False] = ...,
            **inputs: Unpack[TokenInputs],
        ) -> Tensor: ...
        @overload
        def __call__(
            self,
            nll: Tensor,
            valid: Tensor | None = ...,
            num_items_in_batch: Items = ...,
            *,
            entropy: Tensor | None = ...,
            return_stats: Literal[True],
            **inputs: Unpack[TokenInputs],
        ) -> tuple[Tensor, NVAMPStats]: ...
        def __call__(self, *args: object, **kwargs: object) -> object: ...


# NVAMP -------------------------------------------------------------------------------------------------


class _Field(Generic[T]):
    """An option of a criterion's objective, as an attribute of the criterion."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, criterion: "_Criterion | None", owner: type | None = None) -> T:
        if criterion is None:
            return cast(T, self)  # as an attribute of the class
        return cast(T, getattr(criterion.objective, self.name))

    def __set__(self, criterion: _Criterion, value: T) -> None:
        criterion.objective = replace(criterion.objective, **{self.name: value})


class _NVAMP(_Criterion):
    """The options of NVAMP as attributes, which a schedule may set: `criterion.gamma = 0.2`."""

    _objective = NVAMP
    alpha = _Field[float]()
    beta = _Field[float]()
    gamma = _Field[float]()
    eps = _Field[float]()
    tail = _Field[float]()
    gradient = _Field[Gradient]()

    def _objective_repr(self) -> str:
        return repr(self.objective).removeprefix("NVAMP(").removesuffix(")")


class NVAMPLoss(_NVAMP, Loss):
    """NVAMP loss of logits: `Loss(NVAMP(...))`.

    It is cross-entropy, weighted by the dispersion of the losses, and a penalty on the largest ones:

        L = alpha·d·C + beta·C + gamma·X·(N/M)

    `nvamp.objectives.NVAMP` defines the symbols and describes alpha, beta, gamma, eps, tail and gradient;
    `nvamp.Loss` describes the other arguments, the attributes and the errors.

    References:
        Mariusz Kurman, NVAMP Loss, 2025: https://github.com/mkurman/nvamp-loss

    Example:
        >>> loss = NVAMPLoss()(logits, labels)  # [batch, seq, vocab], [batch, seq] -> scalar
    """

    @spelled_out(LogitsOptions)
    def __init__(
        self,
        alpha: float = 1.0,
        beta: float = 0.02,
        gamma: float = 0.001,
        eps: float = 1e-6,
        ignore_index: int = IGNORE_INDEX,
        *,
        tail: float = 0.0,
        gradient: Gradient = "scalar",
        **options: Unpack[LogitsOptions],
    ) -> None:
        super().__init__(NVAMP(alpha, beta, gamma, eps, tail, gradient), ignore_index, **options)


class LinearNVAMPLoss(_NVAMP, LinearLoss):
    """NVAMP loss of hidden states and the weight of the output layer: `LinearLoss(NVAMP(...))`.

    The arguments are as in `NVAMPLoss`, with the options of `LinearLoss` in place of those of `Loss`.

    Example:
        >>> loss = LinearNVAMPLoss()(hidden, lm_head.weight, labels)
    """

    @spelled_out(LinearOptions)
    def __init__(
        self,
        alpha: float = 1.0,
        beta: float = 0.02,
        gamma: float = 0.001,
        eps: float = 1e-6,
        ignore_index: int = IGNORE_INDEX,
        *,
        tail: float = 0.0,
        gradient: Gradient = "scalar",
        **options: Unpack[LinearOptions],
    ) -> None:
        super().__init__(NVAMP(alpha, beta, gamma, eps, tail, gradient), ignore_index, **options)


class TokenNVAMPLoss(_NVAMP, TokenLoss):
    """NVAMP loss of per-token losses computed elsewhere: `TokenLoss(NVAMP(...))`.

    The arguments are those of `NVAMPLoss` that concern the objective, and `process_group`.

    Example:
        >>> loss = TokenNVAMPLoss()(-logprobs, labels != -100)
    """

    @spelled_out(TokenLossOptions)
    def __init__(
        self,
        alpha: float = 1.0,
        beta: float = 0.02,
        gamma: float = 0.001,
        eps: float = 1e-6,
        *,
        tail: float = 0.0,
        gradient: Gradient = "scalar",
        **options: Unpack[TokenLossOptions],
    ) -> None:
        super().__init__(NVAMP(alpha, beta, gamma, eps, tail, gradient), **options)
