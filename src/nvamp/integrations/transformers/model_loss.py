"""A criterion as the `loss_function` of a transformers model."""

from collections.abc import Callable
from typing import Any, cast

from torch import Tensor

from nvamp.apply import TokenInputs
from nvamp.losses import LinearLoss, Loss

# (logits [B, S, V], labels [B, S], num_items_in_batch=...) -> scalar; it shifts the labels itself.
Criterion = Callable[..., Tensor]
# What a batch may have for an objective, beside its labels.
TOKEN_INPUTS = tuple(TokenInputs.__annotations__)


class ModelLoss:
    """What `model.loss_function` calls, with a criterion of logits."""

    def __init__(self, criterion: Criterion) -> None:
        self.criterion = criterion

    def __call__(
        self,
        logits: Any,
        labels: Tensor | None,
        vocab_size: int | None = None,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """The loss, a scalar.

        Args:
            logits: [B, S, V].
            labels: [B, S]; not looked at where there are `shift_labels`.
            vocab_size: not used: it is V.
            shift_labels: [B, S], for the logits at the same place.
            kwargs: not used, as in transformers.
        """
        own_index = getattr(self.criterion, "ignore_index", -100)
        if ignore_index not in (-100, own_index):
            raise ValueError(f"the criterion has ignore_index={own_index}, the model asks for {ignore_index}")
        targets = labels if shift_labels is None else shift_labels
        if targets is None:
            raise ValueError("labels are missing: neither labels nor shift_labels were given")
        if isinstance(num_items_in_batch, Tensor):  # of the first device, where a model lies on several
            num_items_in_batch = num_items_in_batch.to(logits.device, non_blocking=True)
        inputs = cast(TokenInputs, {name: kwargs[name] for name in TOKEN_INPUTS if name in kwargs})
        value = self.value(
            logits, targets.to(logits.device), shift_labels is not None, num_items_in_batch, inputs
        )
        return share(value, num_items_in_batch, self.criterion)

    def value(
        self,
        logits: Any,
        labels: Tensor,
        shifted: bool,
        num_items_in_batch: Tensor | int | None,
        inputs: TokenInputs,
    ) -> Any:
        criterion = self.criterion
        if isinstance(criterion, Loss | LinearLoss):
            changed = {"shift": False} if shifted else {}
            return criterion._of_logits(
                logits, labels, criterion._call(num_items_in_batch, inputs), **changed
            )
        if shifted:
            raise TypeError(f"shift_labels need a Loss, got {criterion!r}, which shifts by itself")
        return criterion(logits, labels, num_items_in_batch=num_items_in_batch, **inputs)


def share(value: Tensor, num_items_in_batch: Tensor | int | None, criterion: Criterion) -> Tensor:
    """This rank's part of a loss that the `Trainer` adds up over ranks, where it gives a number of tokens."""
    group = getattr(criterion, "process_group", None)
    if group is None or num_items_in_batch is None:
        return value
    from nvamp.distributed import ranks_of  # only here: PyTorch can be built without it

    return value / ranks_of(group).size
