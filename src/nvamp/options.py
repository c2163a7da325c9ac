"""The options of the losses. Each is declared here once, with its type, its default and its check.

An objective declares its own options the same way, as the fields of its dataclass: see `option`.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import field
from numbers import Integral, Real
from typing import TYPE_CHECKING, Annotated, NamedTuple, TypedDict, TypeVar, cast, get_args

import torch
from torch import Tensor

if TYPE_CHECKING:
    from nvamp.distributed import Group

# The smallest and the largest positive number that float32 can hold without rounding to 0 or inf.
TINY, HUGE = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
IGNORE_INDEX = -100

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., object])
Check = Callable[[str, object], object]  # (name, value) -> the value to keep; or an error that names both


class Option(NamedTuple):
    """The default of an option, and the check of its value."""

    default: object
    check: Check


# Checks ------------------------------------------------------------------------------------------------


def between(low: float, high: float = math.inf, *, open_low: bool = False) -> Check:
    """A number that float32 can hold, from low to high; `open_low` leaves out low itself."""
    if high < math.inf:
        wanted = f"in [{low:g}, {high:g}]"
    elif low > -math.inf:
        wanted = f"finite and {'above' if open_low else 'at least'} {low:.2g}"
    else:
        wanted = "finite"

    def check(name: str, value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"{name} must be a number, got {value!r}")
        kind: type = type(value)
        value = cast(float, value) if kind in (int, float) else float(value)  # NumPy's, for example
        if not (low < value if open_low else low <= value) or not value <= high or abs(value) == math.inf:
            raise ValueError(f"{name} must be {wanted}, got {value}")
        if value and not TINY <= abs(value) <= HUGE:
            raise ValueError(f"{name} must be a number that float32 can hold, got {value}")
        return value

    return check


def not_zero(name: str, value: object) -> float:
    number = cast(float, between(-math.inf)(name, value))
    if not number:
        raise ValueError(f"{name} must not be 0")
    return number


def one_of(*choices: str) -> Check:
    def check(name: str, value: object) -> object:
        if not isinstance(value, str) or value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
        return value

    return check


def flag(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return value


def optional(check: Check) -> Check:
    """None, or anything that `check` lets through."""
    return lambda name, value: None if value is None else check(name, value)


def check_ignore_index(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an int, got {value!r}")
    index = int(value)
    if not -(2**31) <= index < 2**31:
        raise ValueError(f"{name} must be in the range of int32, got {index}")
    return index


def _group(name: str, value: object) -> object:
    from nvamp.distributed import check_group  # only here: PyTorch can be built without it

    check_group(name, value)
    return value


def _backend(name: str, value: object) -> object:
    from nvamp.engine.backends import check_backend

    check_backend(cast(str, value))
    return value


def _dtype(name: str, value: object) -> object:
    if not isinstance(value, torch.dtype):
        raise TypeError(f"{name} must be a torch.dtype or None, got {value!r}")
    return value


def _class_weight(name: str, value: object) -> object:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        got = value.dtype if isinstance(value, Tensor) else repr(value)
        raise TypeError(f"{name} must be a floating-point tensor or None, got {got}")
    if value.dim() != 1:
        raise ValueError(f"{name} must have shape [vocabulary], got {list(value.shape)}")
    if value.requires_grad:
        raise ValueError(f"{name} must not require a gradient: it gets none")
    return value


# Options -----------------------------------------------------------------------------------------------


class _TargetOptions(TypedDict, total=False):
    label_smoothing: Annotated[float, Option(0.0, between(0, 1))]
    z_loss: Annotated[float, Option(0.0, between(0))]


class _PredictionOptions(TypedDict, total=False):
    softcap: Annotated[float | None, Option(None, optional(between(0, open_low=True)))]
    logit_scale: Annotated[float, Option(1.0, not_zero)]


class TokenOptions(_TargetOptions, _PredictionOptions, total=False):
    """Keyword arguments that change the loss of a single token.

    With `x` the logits of a token, `y` its label and `z = softcap·tanh(logit_scale·x / softcap)`
    (without `softcap`, `z = logit_scale·x`):

        loss = logsumexp(z) − (1 − label_smoothing)·z[y] − label_smoothing·mean(z) + z_loss·logsumexp(z)²

    With a `class_weight` w, each class v has its part of the target, and the loss is

        loss = Σ_v t_v·(logsumexp(z) − z[v] + z_loss·logsumexp(z)²)
        t_v = w[v]·((1 − label_smoothing)·[v = y] + label_smoothing / V)

    `label_smoothing` is in [0, 1]; `z_loss` is at least 0, and 1e-4 in PaLM (arXiv 2204.02311); `softcap` is
    above 0, and 30 in Gemma 2 (arXiv 2408.00118); `logit_scale` is not 0.
    """


class _Backend(TypedDict, total=False):
    backend: Annotated[str | None, Option(None, optional(_backend))]


class _VocabGroup(TypedDict, total=False):
    vocab_group: Annotated["Group | None", Option(None, optional(_group))]


class EngineOptions(TokenOptions, _Backend, total=False):
    """Keyword arguments of all functions that compute the losses of tokens."""

    class_weight: Annotated[Tensor | None, Option(None, optional(_class_weight))]


class PartOptions(EngineOptions, _VocabGroup, total=False):
    """The same for functions that take a vocabulary in parts on several ranks."""


class LogprobOptions(_PredictionOptions, _Backend, _VocabGroup, total=False):
    """Keyword arguments of `nvamp.functional.logprobs`, which describes them."""

    temperature: Annotated[float, Option(1.0, between(0, open_low=True))]


class NLLOptions(PartOptions, total=False):
    """Keyword arguments of `nvamp.functional.token_nll`, which describes them."""

    inplace_backward: Annotated[bool, Option(False, flag)]


class LinearSumOptions(EngineOptions, total=False):
    """Keyword arguments of the linear path in one pass."""

    accum_dtype: Annotated[torch.dtype | None, Option(None, optional(_dtype))]


class LinearNLLOptions(LinearSumOptions, PartOptions, total=False):
    """Keyword arguments of `nvamp.functional.linear_token_nll`, which describes them."""

    reduce_grad_hidden: Annotated[bool, Option(True, flag)]


class BatchOptions(TypedDict, total=False):
    """Keyword arguments for the layout of a batch."""

    shift: Annotated[bool, Option(True, flag)]
    process_group: Annotated["Group | None", Option(None, optional(_group))]


class LogitsOptions(NLLOptions, BatchOptions, total=False):
    """Keyword arguments of `nvamp.Loss`, which describes them."""


class LinearOptions(LinearNLLOptions, BatchOptions, total=False):
    """Keyword arguments of `nvamp.LinearLoss`, which describes them."""


class TokenLossOptions(TypedDict, total=False):
    """Keyword arguments of `nvamp.TokenLoss`, which describes them."""

    process_group: Annotated["Group | None", Option(None, optional(_group))]


def _declared(options: type) -> dict[str, Option]:
    """The options of a class above, in its order."""
    return {name: get_args(annotation)[1] for name, annotation in options.__annotations__.items()}


DECLARED: dict[type, dict[str, Option]] = {
    options: _declared(options)
    for options in (
        TokenOptions,
        NLLOptions,
        LinearSumOptions,
        LinearNLLOptions,
        LogitsOptions,
        LinearOptions,
        TokenLossOptions,
        LogprobOptions,
    )
}


def check_options(of: type, options: Mapping[str, object], caller: str) -> dict[str, object]:
    """All options of the class `of`: the given ones, checked, and the defaults of the others.

    Raises:
        TypeError: an option that `caller` does not have, or one of another type.
        ValueError: an option out of range.
    """
    check_names(of, options, caller)
    return {
        name: option.check(name, options[name]) if name in options else option.default
        for name, option in DECLARED[of].items()
    }


def check_names(of: type, options: Mapping[str, object], caller: str) -> None:
    """Raises a `TypeError` for an option that the class `of` does not have."""
    for name in options:
        if name not in DECLARED[of]:
            raise TypeError(f"{caller}() got an unexpected keyword argument {name!r}")


def spelled_out(options: type) -> Callable[[F], F]:
    """Lists the single options in place of `**options` in the signature, for `help` and other readers."""

    def spell_out(function: F) -> F:
        own = inspect.signature(function)
        *named, _ = own.parameters.values()
        more = [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=DECLARED[options][name].default,
                annotation=getattr(annotation.__origin__, "__forward_arg__", annotation.__origin__),
            )
            for name, annotation in options.__annotations__.items()
        ]
        function.__doc__ = function.__doc__ or "The class describes the arguments."
        function.__signature__ = own.replace(parameters=[*named, *more])  # type: ignore[attr-defined]
        return function

    return spell_out


def option(default: T, check: Check) -> T:
    """A field of an objective's dataclass, with its default and its check."""
    return field(default=default, metadata={"check": check})
