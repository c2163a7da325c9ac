"""NVAMP, or any other criterion, as the loss of a Hugging Face model or of the `Trainer`."""

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

from nvamp.integrations.transformers.model_loss import Criterion, ModelLoss, share
from nvamp.integrations.transformers.patching import patch, unpatch

__all__ = ["Criterion", "LossFunction", "compute_loss_func", "logits_of", "loss_function", "patch", "unpatch"]


class LossFunction(Protocol):
    """What `Trainer(compute_loss_func=...)` calls."""

    def __call__(
        self, outputs: Any, labels: Tensor | None, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor: ...


def compute_loss_func(criterion: Criterion) -> LossFunction:
    """`criterion` as the `compute_loss_func` of a `Trainer`, which then leaves the model's own loss out.

    Where the `Trainer` gives the number of tokens of the optimizer step, the loss of a criterion with a
    `process_group` is divided by the size of the group; docs/transformers.md says why.

    Args:
        criterion: called as `criterion(logits [B, S, V], labels [B, S], num_items_in_batch=...)`, gives a
            scalar. The labels are not shifted; shifting them is the criterion's part, as `NVAMPLoss()` does.

    Example:
        Trainer(model, args, train_dataset=data, compute_loss_func=compute_loss_func(NVAMPLoss()))

        # On several ranks; it is `TrainingArguments` that makes the group.
        args = TrainingArguments(...)
        criterion = NVAMPLoss(process_group=torch.distributed.group.WORLD)
        Trainer(model, args, train_dataset=data, compute_loss_func=compute_loss_func(criterion))
    """

    def loss(outputs: Any, labels: Tensor | None, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        if labels is None:
            raise ValueError("labels are missing: the batches of the Trainer need a column named 'labels'")
        value = criterion(logits_of(outputs), labels, num_items_in_batch=num_items_in_batch)
        return share(value, num_items_in_batch, criterion)

    return loss


def loss_function(criterion: Criterion) -> ModelLoss:
    """`criterion` as `model.loss_function`: the model computes its logits, and this loss of them.

    It is called as transformers' `ForCausalLMLoss` is, and with `num_items_in_batch` follows the convention
    of `compute_loss_func`.

    Args:
        criterion: as for `compute_loss_func`. Batches with `shift_labels`, shifted before they were split
            over ranks, need an `NVAMPLoss`.

    Example:
        model.loss_function = loss_function(NVAMPLoss())
    """
    return ModelLoss(criterion)


def logits_of(outputs: Any) -> Tensor:
    """The logits [B, S, V] of what a model without labels returns: a `ModelOutput`, a dict or a tuple."""
    logits: Tensor = outputs["logits"] if isinstance(outputs, Mapping) else outputs[0]
    return logits
