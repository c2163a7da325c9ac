"""The options that every backend shares."""

import math
from typing import NamedTuple, TypedDict

import torch
from torch import Tensor


class TokenOptions(TypedDict, total=False):
    """Keyword arguments that change the loss of a single token.

    With `x` the logits of a token, `y` its label and `z = softcap·tanh(logit_scale·x / softcap)`
    (without `softcap`, `z = logit_scale·x`):

        loss = logsumexp(z) − (1 − label_smoothing)·z[y] − label_smoothing·mean(z) + z_loss·logsumexp(z)²
    """

    label_smoothing: float  # in [0, 1), default 0
    z_loss: float  # at least 0, default 0; PaLM, arXiv:2204.02311, uses 1e-4
    softcap: float | None  # above 0, default None; Gemma 2, arXiv:2408.00118, uses 30
    logit_scale: float  # not 0, default 1


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
    ignore_index, label_smoothing, z_loss, softcap, logit_scale = options
    if not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index must be an int, got {ignore_index!r}")
    if not -(2**31) <= ignore_index < 2**31:
        raise ValueError(f"ignore_index must be in the range of int32, got {ignore_index}")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}")
    if not 0 <= z_loss < math.inf:
        raise ValueError(f"z_loss must be finite and at least 0, got {z_loss}")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap must be finite and above 0, or None, got {softcap}")
    if not 0 < abs(logit_scale) < math.inf:
        raise ValueError(f"logit_scale must be finite and not 0, got {logit_scale}")
    return options


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of losses and softmax arithmetic: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
