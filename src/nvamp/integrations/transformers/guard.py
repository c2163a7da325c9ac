"""A model with a criterion trains with no other loss: a call that would is an error."""

import sys
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from nvamp.integrations.transformers.model_loss import ModelLoss, watched_call

_SFT = "trl.trainer.sft_trainer"


def guarded(model: Any, loss: ModelLoss, forward: Callable[[], Any], labels: Any, fused_head: bool) -> Any:
    """The outputs of `forward()`, a call of the model with these labels.

    Args:
        loss: the model's `loss_function`.
        fused_head: whether TRL asks its own head for the losses of the tokens.

    Raises:
        RuntimeError: the outputs hold a loss, and `loss` was not called; or they hold logits that another
            loss could be trained from.
    """
    with watched_call(loss) as call:
        outputs = forward()
    if not call.loss_was_called:
        _refuse_another_loss(model, loss, outputs, labels, fused_head)
    return outputs


def _refuse_another_loss(model: Any, loss: ModelLoss, outputs: Any, labels: Any, fused_head: bool) -> None:
    installed = f"the criterion of this {type(model).__name__}, {type(loss.criterion).__name__}"
    could_train = model.training and not loss.logits_without_labels and _has_logits_to_train(outputs)
    if fused_head:
        if _caller_in_trl() == _SFT:
            raise RuntimeError(
                f"trl.SFTTrainer computes a loss of its own and does not call {installed}: use "
                "nvamp.integrations.trl.SFTTrainer(criterion=TokenLoss(...)), with a model that is not "
                "patched and has no loss_function"
            )
    elif _has_loss(outputs, labels):
        raise RuntimeError(
            f"the forward computed a loss and did not call {installed}. Liger's fused loss does that: turn "
            'it off with liger_kernel_config={"fused_linear_cross_entropy": False} in TrainingArguments, or '
            "with fused_linear_cross_entropy=False where Liger is applied. A model that computes its "
            "loss itself needs patch(model, LinearLoss(...)) or compute_loss_func(Loss(...), model)"
        )
    elif could_train and _caller_in_trl() in (None, _SFT):
        raise RuntimeError(
            "the model was called in training without labels, so its logits do not go through "
            f"{installed}. A Trainer calls it so if it has a label_smoothing_factor or a compute_loss_func, "
            "or takes the labels for a loss of its own. Pass the labels, with label_smoothing as an option "
            "of the criterion. To train with the other loss, take the criterion off the model: "
            "unpatch(model), or assign transformers' own loss to model.loss_function. If the logits are for "
            "something else, give logits_without_labels=True to patch or loss_function"
        )


def _has_loss(outputs: Any, labels: Any) -> bool:
    if isinstance(outputs, Mapping):
        return outputs.get("loss") is not None
    return labels is not None and isinstance(outputs, tuple)  # the first of them is the loss


def _has_logits_to_train(outputs: Any) -> bool:
    """Whether there are logits with a gradient: there are none under `torch.no_grad`, as in generation."""
    if isinstance(outputs, Mapping):
        logits = outputs.get("logits")
    else:
        logits = outputs[0] if isinstance(outputs, tuple) and outputs else None
    return isinstance(logits, Tensor) and logits.dim() > 1 and logits.requires_grad


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _caller_in_trl() -> str | None:
    """The module of TRL that the call comes from, if one is on the stack.

    TRL's other trainers compute losses of their own (DPO, GKD) by the same calls of a model as `SFTTrainer`,
    or as somebody who forgets the criterion: no argument tells them apart.
    """
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        module: str = frame.f_globals.get("__name__", "")
        if module.startswith("trl."):
            return module
        frame = frame.f_back
    return None
