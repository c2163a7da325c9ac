"""Objectives as text for command lines and configuration files: `nvamp:gamma=0.04,tail=0.05`.

`parse` and `str` of an objective are inverses. A text may also set the `TokenOptions`, which change the loss
of a single token; `parse_loss` reads those too.
"""

from collections.abc import Mapping
from dataclasses import Field, fields, replace
from typing import NamedTuple, cast

from nvamp.objectives.base import Objective
from nvamp.objectives.clipped_policy import ClippedPolicy
from nvamp.objectives.cross_entropy import CrossEntropy
from nvamp.objectives.dft import DFT
from nvamp.objectives.entropy_weighted import EntropyWeighted
from nvamp.objectives.focal import Focal
from nvamp.objectives.gce import GCE
from nvamp.objectives.nvamp import NVAMP
from nvamp.objectives.tail import Tail
from nvamp.objectives.tilted import Tilted
from nvamp.objectives.token_weighted import TokenWeighted
from nvamp.objectives.truncated import Truncated
from nvamp.options import DECLARED, TokenOptions

OBJECTIVES: dict[str, type[Objective]] = {
    "ce": CrossEntropy,
    "nvamp": NVAMP,
    "tail": Tail,
    "tilted": Tilted,
    "truncated": Truncated,
    "focal": Focal,
    "gce": GCE,
    "dft": DFT,
    "entropy": EntropyWeighted,
    "token_weighted": TokenWeighted,
    "clipped_policy": ClippedPolicy,
}


class LossSpec(NamedTuple):
    """An objective, and the options of the loss of a token that differ from their defaults."""

    objective: Objective
    token_options: TokenOptions

    def __str__(self) -> str:
        text = str(self.objective)
        options = [f"{name}={_shown(value)}" for name, value in self.token_options.items()]
        return text + (":" if options and ":" not in text else "," if options else "") + ",".join(options)


def parse(text: str) -> Objective:
    """The objective that `name` or `name:option=value,option=value` describes.

    Raises:
        ValueError: an unknown name or option, or a value that the option cannot have.

    Example:
        >>> parse("nvamp:gamma=0.04,tail=0.05")
        NVAMP(alpha=1.0, beta=0.02, gamma=0.04, eps=1e-06, tail=0.05, gradient='scalar')
    """
    objective, token_options = parse_loss(text)
    if token_options:
        raise ValueError(
            f"{text!r}: expected options of an objective, got {', '.join(token_options)}, which the loss of "
            "a token takes"
        )
    return objective


def parse_loss(text: str) -> LossSpec:
    """The same for a text that may set options of the loss of a token too: `ce:label_smoothing=0.1`."""
    name, _, tail = (part.strip() for part in text.partition(":"))
    if name not in OBJECTIVES:
        raise ValueError(f"{text!r}: unknown objective {name!r}, known are {', '.join(OBJECTIVES)}")
    objective = OBJECTIVES[name]()
    own = {field.name: field for field in fields(objective)}
    found: dict[str, object] = {}
    for item in filter(None, (part.strip() for part in tail.split(","))):
        option, equals, value = (part.strip() for part in item.partition("="))
        if not equals or not value:
            raise ValueError(f"{text!r}: expected option=value, got {item!r}")
        if option in found:
            raise ValueError(f"{text!r}: {option} is given twice")
        if option not in own and option not in DECLARED[TokenOptions]:
            options = ", ".join([*own, *DECLARED[TokenOptions]])
            raise ValueError(f"{text!r}: unknown option {option!r}, {name} takes {options}")
        found[option] = _value(text, option, value, own.get(option))
    try:
        changed = replace(objective, **{k: v for k, v in found.items() if k in own})
        return LossSpec(changed, token_options_of({k: v for k, v in found.items() if k not in own}))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{text!r}: {error}") from error


def token_options_of(options: Mapping[str, object]) -> TokenOptions:
    """The options of the loss of a token among these, checked, without those at their default.

    They come in the order of their declaration, so that their text does not depend on how they were given.
    """
    checked = {
        name: option.check(name, options[name])
        for name, option in DECLARED[TokenOptions].items()
        if name in options and options[name] != option.default
    }
    return cast(TokenOptions, checked)


def _value(text: str, option: str, value: str, field: "Field[object] | None") -> object:
    default = DECLARED[TokenOptions][option].default if field is None else field.default
    if isinstance(default, str):
        return value
    if isinstance(default, bool):
        if value.lower() not in ("true", "false"):
            raise ValueError(f"{text!r}: {option} must be true or false, got {value!r}")
        return value.lower() == "true"
    if value.lower() == "none" and default is None:
        return None
    try:
        return float(value)
    except ValueError:
        raise ValueError(f"{text!r}: {option} must be a number, got {value!r}") from None


def spell(objective: Objective) -> str:
    """The text of an objective: its name, and the options that differ from their defaults."""
    names = [name for name, kind in OBJECTIVES.items() if kind is type(objective)]
    name = names[0] if names else type(objective).__name__
    values = {field.name: (getattr(objective, field.name), field.default) for field in fields(objective)}
    options = [f"{name}={_shown(value)}" for name, (value, default) in values.items() if value != default]
    return name + (":" + ",".join(options) if options else "")


def _shown(value: object) -> str:
    """The shortest spelling of a value that reads back as the same value."""
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if not isinstance(value, float | int):
        return str(value)
    short = f"{value + 0.0:g}"  # −0 is spelled as 0
    return short if float(short) == value else repr(float(value))
