"""NVAMP, or any other criterion, as the loss of the Hugging Face `Trainer`."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from torch import Tensor

# (logits [B, S, V], labels [B, S], num_items_in_batch=...) -> scalar; it shifts the labels itself.
Criterion = Callable[..., Tensor]


class LossFunction(Protocol):
    """What `Trainer(compute_loss_func=...)` calls."""

    def __call__(
        self, outputs: Any, labels: Tensor | None, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor: ...


def compute_loss_func(criterion: Criterion) -> LossFunction:
    """`criterion` as the `compute_loss_func` of a `Trainer`.

    The `Trainer` takes the labels out of the batch before it calls the model, so the model computes no loss
    of its own, and passes the number of scored tokens of the whole optimizer step as `num_items_in_batch`:
    losses of accumulated micro-batches add up.

    Args:
        criterion: called as `criterion(logits [B, S, V], labels [B, S], num_items_in_batch=...)`, gives a
            scalar. The labels are not shifted; shifting them is the criterion's part, as `NVAMPLoss()` does.

    Example:
        Trainer(model, args, train_dataset=data, compute_loss_func=compute_loss_func(NVAMPLoss()))
    """

    def loss(outputs: Any, labels: Tensor | None, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        if labels is None:
            raise ValueError("labels are missing: the batches of the Trainer need a column named 'labels'")
        return criterion(logits_of(outputs), labels, num_items_in_batch=num_items_in_batch)

    return loss


def logits_of(outputs: Any) -> Tensor:
    """The logits [B, S, V] of what a model without labels returns: a `ModelOutput`, a dict or a tuple."""
    logits: Tensor = outputs["logits"] if isinstance(outputs, Mapping) else outputs[0]
    return logits
