"""Checks of the engine's arguments. None of them waits for a device."""

import torch
from torch import Tensor
from torch._C._functorch import TransformType, get_interpreter_stack
from torch.autograd import forward_ad

from nvamp.engine import devices
from nvamp.engine.options import accumulate_dtype

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_tensor(name: str, x: object) -> None:
    """Raises unless x, called `name`, is a tensor with a place for every element."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.is_nested or x.layout != torch.strided:
        kind = "a nested one" if x.is_nested else f"one with layout {x.layout}"
        raise TypeError(f"{name} must be a dense tensor, got {kind}")


def check_floating(name: str, x: Tensor) -> None:
    """Raises unless x, called `name`, is a dense tensor of a dtype in `FLOATING`."""
    check_tensor(name, x)
    if x.dtype not in FLOATING:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}")


def check_logits(logits: Tensor, part: bool = False) -> None:
    """Raises unless logits are a floating-point [..., V] with at least two dimensions and V > 0.

    A `part` of a vocabulary may be empty.
    """
    check_floating("logits", logits)
    if logits.dim() < 2 or (logits.shape[-1] == 0 and not part):
        raise ValueError(f"logits must have shape [..., vocabulary], got {list(logits.shape)}")


def check_labels(labels: Tensor, x: Tensor, name: str) -> Tensor:
    """Raises unless labels are class indices for x [..., features], called `name`, on its device.

    Returns the labels, uint8 as int64: uint8, which PyTorch takes too, cannot hold an `ignore_index` of −100.
    """
    check_tensor("labels", labels)
    if labels.dtype not in (torch.int64, torch.int32, torch.uint8):
        raise TypeError(f"labels must be int64, int32 or uint8 class indices, got {labels.dtype}")
    if labels.shape != x.shape[:-1]:
        raise ValueError(
            f"labels must have shape {list(x.shape[:-1])}, that of {name} {list(x.shape)} without the last "
            f"dimension, got {list(labels.shape)}"
        )
    if labels.device != x.device:
        raise ValueError(f"labels must be on the device of {name}, {x.device}, got {labels.device}")
    return labels.long() if labels.dtype == torch.uint8 else labels


def check_linear(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raises unless all are floating-point tensors and hidden is [..., D] with two dimensions and D > 0."""
    check_floating("hidden", hidden)
    check_floating("weight", weight)
    if bias is not None:
        check_floating("bias", bias)
    if hidden.dim() < 2 or hidden.shape[-1] == 0:
        raise ValueError(f"hidden must have shape [..., features], got {list(hidden.shape)}")


def check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None, part: bool = False) -> None:
    """Raises unless hidden [..., D], weight [V, D] and bias [V] fit together in shape, dtype and device."""
    if weight.dim() == 1 and not weight.numel():
        raise ValueError(
            f"weight must have shape [vocabulary, {hidden.shape[-1]}], got {list(weight.shape)}, as "
            "DeepSpeed's ZeRO-3 leaves a weight between the layers: compute the loss within "
            "deepspeed.zero.GatheredParameters([weight]), and leave it after the backward"
        )
    if weight.dim() != 2 or (weight.shape[0] == 0 and not part) or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"weight must have shape [vocabulary, {hidden.shape[-1]}] for hidden {list(hidden.shape)}, "
            f"got {list(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have shape [{weight.shape[0]}], got {list(bias.shape)}")
    for name, x in (("weight", weight), ("bias", bias)):
        if x is not None and x.dtype != hidden.dtype:
            raise TypeError(f"{name} must have the dtype of hidden, {hidden.dtype}, got {x.dtype}")
        if x is not None and x.device != hidden.device:
            raise ValueError(f"{name} must be on the device of hidden, {hidden.device}, got {x.device}")


def check_transforms(backend: str, *inputs: Tensor | None) -> None:
    """Raises if the caller asks for derivatives that the operators of a fused backend do not have.

    PyTorch would not report forward mode: it drops the tangents, which makes the derivative 0.
    """
    if backend == "reference" or torch.compiler.is_compiling():
        return
    transforms = {interpreter.key() for interpreter in get_interpreter_stack() or ()}
    if transforms & {TransformType.Grad, TransformType.Jvp} or any(map(_has_tangent, inputs)):
        raise NotImplementedError(
            f"backend {backend!r} has no forward-mode derivatives and none under torch.func (grad, vjp, jvp, "
            '...): use backend="reference"'
        )


def has_transforms() -> bool:
    """Whether a transform of `torch.func`, forward mode or `torch.jit.trace` is active."""
    if torch.compiler.is_compiling():
        return False
    in_forward_mode = forward_ad._current_level >= 0
    return in_forward_mode or bool(get_interpreter_stack()) or torch._C._is_tracing()


def _has_tangent(x: Tensor | None) -> bool:
    in_forward_mode = forward_ad._current_level >= 0
    if not in_forward_mode or x is None:
        return False
    return forward_ad.unpack_dual(x).tangent is not None  # type: ignore[no-untyped-call]


def check_accum_dtype(accum_dtype: torch.dtype | None, weight: Tensor) -> None:
    """Raises unless products in the dtype of the weight can be added up in `accum_dtype`."""
    possible = (weight.dtype, accumulate_dtype(weight.dtype))
    if accum_dtype is not None and accum_dtype not in possible:
        names = " or ".join(str(dtype) for dtype in dict.fromkeys(possible))
        raise ValueError(f"accum_dtype must be {names} for a weight in {weight.dtype}, got {accum_dtype}")


def check_class_weight(class_weight: Tensor, vocab: int | Tensor) -> None:
    """Raises unless there is a weight for each of `vocab` classes. It does not wait to find out."""
    if isinstance(vocab, Tensor) and (torch.compiler.is_compiling() or not devices.can_look(vocab)):
        return
    if len(class_weight) != vocab:
        raise ValueError(
            f"class_weight must have shape [{int(vocab)}], a weight for each class of the vocabulary, "
            f"got {list(class_weight.shape)}"
        )


def check_label_range(labels: Tensor, vocab: int | Tensor, ignore_index: int) -> None:
    """Raises if a label is neither in [0, vocab) nor `ignore_index`; on a CPU only, so that nothing waits."""
    if not devices.can_look(labels):
        return
    invalid = (labels != ignore_index) & ((labels < 0) | (labels >= vocab))
    if invalid.any():
        vocab = int(vocab)
        raise ValueError(
            f"labels must be in [0, {vocab}) for a vocabulary of {vocab}, or ignore_index={ignore_index}, "
            f"got {int(labels[invalid][0])}"
        )
