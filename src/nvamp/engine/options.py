"""The options that every backend shares."""

from typing import NamedTuple

import torch
from torch import Tensor

from nvamp.options import DECLARED, TokenOptions, check_ignore_index

__all__ = ["Head", "Needs", "Options", "TokenOptions", "accumulate_dtype", "checked"]


class Options(NamedTuple):
    """`ignore_index` and the `TokenOptions`, in the order in which the operators take them."""

    ignore_index: int = -100
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float | None = None
    logit_scale: float = 1.0


class Head(NamedTuple):
    """What the linear path makes logits of: hidden @ weightᵀ + bias."""

    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    labels: Tensor  # [N]


class Needs(NamedTuple):
    """Which gradients of the linear path are asked for."""

    hidden: bool
    weight: bool
    bias: bool


def checked(options: Options) -> Options:
    """`options`, or an error that names the one that is not one."""
    checks = {name: option.check for name, option in DECLARED[TokenOptions].items()}
    checks["ignore_index"] = check_ignore_index
    return Options(*(checks[name](name, value) for name, value in options._asdict().items()))  # type: ignore[arg-type]


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of losses and softmax arithmetic: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
