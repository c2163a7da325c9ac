"""The options that every backend shares."""

from typing import NamedTuple

import torch
from torch import Tensor


class Options(NamedTuple):
    """`ignore_index`, the `TokenOptions` and `class_weight`, in the order in which operators take them."""

    ignore_index: int = -100
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float | None = None
    logit_scale: float = 1.0
    class_weight: Tensor | None = None  # [V], in the dtype of losses


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


def weights_of(labels: Tensor, opt: Options) -> Tensor | None:
    """How much the targets of labels [...] weigh, [..., 2]: at the label, and in all; None if all weigh 1.

    The target of a label y is ((1 − label_smoothing)·[v = y] + label_smoothing/V)·class_weight[v] over the
    classes v. A label that is no class weighs as much as one of another class.
    """
    if opt.class_weight is None:
        return None
    at_label = opt.class_weight[labels.clamp(0, len(opt.class_weight) - 1)] * (1 - opt.label_smoothing)
    return torch.stack((at_label, at_label + opt.label_smoothing * opt.class_weight.mean()), -1)


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of losses and softmax arithmetic: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
