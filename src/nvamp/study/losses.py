"""Losses by name: `ce`, `nvamp:gamma=0.05,gradient=token`, `focal:gamma=2`, `dft`."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor
from torch.nn.functional import pad

from nvamp import NVAMPLoss
from nvamp.functional import token_nll
from nvamp.integrations.transformers import Criterion
from nvamp.objectives import NVAMP
from nvamp.study import StudyError

_NVAMP = ("alpha", "beta", "gamma", "eps", "gradient")
# The options each loss takes, with their defaults.
_OPTIONS: dict[str, dict[str, float | str]] = {
    "ce": {},
    "nvamp": {name: getattr(NVAMP(), name) for name in _NVAMP},
    "focal": {"gamma": 2.0},
    "dft": {},
}


@dataclass(frozen=True)
class Loss:
    """A loss to train with.

    Attributes:
        name: the canonical spelling, the same for all spellings of one loss.
        criterion: `(logits [B, S, V], labels [B, S], num_items_in_batch) -> scalar`; it shifts the labels.
    """

    name: str
    criterion: Criterion

    @property
    def slug(self) -> str:
        """The name, fit for a file name."""
        return re.sub(r"[:,]", "-", self.name)


def parse_losses(specs: list[str]) -> list[Loss]:
    """The losses of `specs`, in their order; a `StudyError` where one is unknown or named twice."""
    losses = [parse_loss(spec) for spec in specs]
    names = [loss.name for loss in losses]
    for i, name in enumerate(names):
        if name in names[:i]:
            raise StudyError(f"--loss {specs[i]}: named twice")
    return losses


def parse_loss(spec: str) -> Loss:
    """The loss that `spec`, `name` or `name:key=value,key=value`, describes; a `StudyError` where none is."""
    name, _, tail = spec.partition(":")
    name = name.strip()
    if name not in _OPTIONS:
        raise StudyError(f"--loss {spec}: unknown loss {name!r}, known are {', '.join(_OPTIONS)}")
    options = _parse_options(spec, name, tail)
    shown = ",".join(f"{key}={_shown(value)}" for key, value in options.items())
    try:
        return Loss(f"{name}:{shown}" if shown else name, _criterion(name, options))
    except (ValueError, TypeError) as error:
        raise StudyError(f"--loss {spec}: {error}") from error


def _shown(value: float | str) -> str:
    """A value as it is spelled in a name: short, where that is the same number."""
    if isinstance(value, str):
        return value
    short = f"{value + 0.0:g}"  # of −0 the same as of 0
    return short if float(short) == value else repr(value)


def _parse_options(spec: str, name: str, tail: str) -> dict[str, float | str]:
    """The options of a spec that are not what they are by default, in the order of the table."""
    known = _OPTIONS[name]
    options: dict[str, float | str] = {}
    for item in filter(None, (part.strip() for part in tail.split(","))):
        key, equals, value = (part.strip() for part in item.partition("="))
        if not equals or not value:
            raise StudyError(f"--loss {spec}: expected key=value, got {item!r}")
        if key not in known:
            takes = f"takes {', '.join(known)}" if known else "takes no options"
            raise StudyError(f"--loss {spec}: unknown option {key!r}, {name} {takes}")
        try:
            options[key] = type(known[key])(value)
        except ValueError:
            raise StudyError(f"--loss {spec}: {key} must be a number, got {value!r}") from None
        if isinstance(known[key], float) and not isfinite(float(value)):
            raise StudyError(f"--loss {spec}: {key} must be finite, got {value}")
    return {key: options[key] for key in known if options.get(key, known[key]) != known[key]}


def _criterion(name: str, options: dict[str, float | str]) -> Criterion:
    if name == "nvamp":
        return NVAMPLoss(**options)  # type: ignore[arg-type]  # the table above pairs keys with types
    if name == "focal":
        gamma = float(options.get("gamma", _OPTIONS["focal"]["gamma"]))
        if gamma < 0:
            raise ValueError(f"gamma must not be negative, got {gamma:g}")
        return _weighted(lambda nll: focal_weight(nll, gamma))
    return _weighted(dft_weight if name == "dft" else torch.ones_like)


def focal_weight(nll: Tensor, gamma: float) -> Tensor:
    """`(1 − p)^gamma` with p = exp(−nll), the weight a focal loss gives a token; the gradient flows through.

    References:
        Lin et al., 2017, Focal Loss for Dense Object Detection: arXiv 1708.02002
    """
    # 1 − p is kept off zero, where the derivative of a power below one has a pole.
    return (-torch.expm1(-nll)).clamp(min=1e-12) ** gamma


def dft_weight(nll: Tensor) -> Tensor:
    """`p = exp(−nll)` as a constant: the weight Dynamic Fine-Tuning gives a token.

    References:
        Wu et al., 2025, On the Generalization of SFT: A Reinforcement Learning Perspective with Reward
        Rectification: arXiv 2508.05629
    """
    return (-nll).exp().detach()


def _weighted(weight: Callable[[Tensor], Tensor]) -> Criterion:
    """The criterion `Σ weight(ℓ)·ℓ / num_items_in_batch` over the losses ℓ of the valid tokens."""

    def criterion(logits: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        labels = shifted(labels)
        nll = token_nll(logits, labels)
        items = (labels != -100).sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        return (weight(nll) * nll).sum() / items

    return criterion


def shifted(labels: Tensor) -> Tensor:
    """The labels [B, S] each position predicts: those of the next one, −100 at the last."""
    return pad(labels[..., 1:], (0, 1), value=-100)
