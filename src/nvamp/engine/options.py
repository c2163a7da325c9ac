"""The options that every backend shares."""

from typing import NamedTuple

import torch
from torch import Tensor


class Options(NamedTuple):
    """`ignore_index` and the `TokenOptions`, in the order in which the operators take them."""

    ignore_index: int = -100
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float | None = None
    logit_scale: float = 1.0


class Head(NamedTuple):
    """What the linear path makes logits from, hidden @ weightᵀ + bias, and the labels."""

    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    labels: Tensor  # [N]


class Needs(NamedTuple):
    """Which gradients of the linear path are needed."""

    hidden: bool
    weight: bool
    bias: bool


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of losses and softmax arithmetic: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
