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

    On several ranks the `Trainer` counts those tokens over all of them. It multiplies the loss of each rank
    by the number of ranks, because DDP and FSDP take the mean of the gradients, and logs the mean of the
    products: the losses of ranks add up as well. A criterion with a `process_group` gives every rank the loss
    of all of them, and the sum would count it once per rank. So its loss is divided by the size of the group
    here; the logged loss and the gradient are then those of the whole batch. In evaluation it is the same.

    With `average_tokens_across_devices=False` the number of tokens is the rank's own, and the `Trainer`
    multiplies by nothing. The division is right there too: the gradient is the mean of those of the ranks,
    each by its own number, which is what that option asks for. But the logged loss is that of the whole batch
    only where all ranks have equally many tokens. Where no number is given nothing is divided: the value is
    that of the criterion, and the mean of the gradients that of the whole batch.

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
        return value if num_items_in_batch is None else value / _group_size(criterion)

    return loss


def _group_size(criterion: Criterion) -> int:
    """How many ranks get the same loss from the criterion."""
    group = getattr(criterion, "process_group", None)
    if group is None:
        return 1
    from nvamp.distributed import ranks_of  # only here: PyTorch can be built without it

    return ranks_of(group).size


def logits_of(outputs: Any) -> Tensor:
    """The logits [B, S, V] of what a model without labels returns: a `ModelOutput`, a dict or a tuple."""
    logits: Tensor = outputs["logits"] if isinstance(outputs, Mapping) else outputs[0]
    return logits
