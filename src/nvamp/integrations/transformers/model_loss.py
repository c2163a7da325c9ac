"""A criterion as the `loss_function` of a transformers model."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from nvamp import LinearNVAMPLoss, NVAMPLoss
from nvamp.functional import Settings, nvamp_loss

# (logits [B, S, V], labels [B, S], num_items_in_batch=...) -> scalar; it shifts the labels itself.
Criterion = Callable[..., Tensor]


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
        value = self.value(
            logits, targets.to(logits.device), shift_labels is not None, num_items_in_batch=num_items_in_batch
        )
        return share(value, num_items_in_batch, self.criterion)

    def value(self, logits: Any, labels: Tensor, shifted: bool, **items: Any) -> Any:
        if not shifted:
            return self.criterion(logits, labels, **items)
        if not isinstance(self.criterion, NVAMPLoss):
            raise TypeError(f"shift_labels need an NVAMPLoss, got {self.criterion!r}, which shifts by itself")
        return nvamp_loss(logits, labels, **options_of(self.criterion, shifted), **items)


def options_of(criterion: NVAMPLoss | LinearNVAMPLoss, shifted: bool) -> dict[str, Any]:
    """The options of a criterion, for the loss as a function; no shift where the labels have it already."""
    options = {name: getattr(criterion, name) for name in Settings._fields}
    return {**options, "shift": False} if shifted else options


def share(value: Tensor, num_items_in_batch: Tensor | int | None, criterion: Criterion) -> Tensor:
    """This rank's part of a loss that the `Trainer` adds up over ranks, where it gives a number of tokens."""
    group = getattr(criterion, "process_group", None)
    if group is None or num_items_in_batch is None:
        return value
    from nvamp.distributed import ranks_of  # only here: PyTorch can be built without it

    return value / ranks_of(group).size
