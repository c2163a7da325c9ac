"""A criterion as the `loss_function` of a transformers model."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

from torch import Tensor

from nvamp.apply import TokenInputs
from nvamp.integrations.columns import check_inputs, token_inputs
from nvamp.losses import LinearLoss, Loss, TokenLoss

# (logits [B, S, V], labels [B, S], num_items_in_batch=...) -> scalar; it shifts the labels itself.
Criterion = Callable[..., Tensor]


def check_criterion(criterion: object) -> None:
    """Raises a `TypeError` unless it can be called with logits and labels."""
    if isinstance(criterion, type):
        raise TypeError(f"criterion must be an instance, got the class {criterion.__name__}")
    place = None
    if isinstance(criterion, LinearLoss):
        place = "patch(model, criterion) takes"
    elif isinstance(criterion, TokenLoss):
        place = "nvamp.integrations.trl.SFTTrainer takes"
    if place or not callable(criterion):
        got = type(criterion).__name__ + (f", which {place}" if place else "")
        raise TypeError(f"criterion must be a loss of logits, such as Loss(NVAMP()), got {got}")


class WatchedCall:
    """A call of a model that is to call this loss."""

    def __init__(self, loss: "ModelLoss") -> None:
        self.loss = loss
        self.loss_was_called = False


class _State(threading.local):
    """The watched calls under way in this thread. It is no ContextVar, which `torch.compile` cannot trace."""

    def __init__(self) -> None:
        # Set here and not in the class: an attribute that a compiled first call adds would fail its guards.
        self.calls: tuple[WatchedCall, ...] = ()


_state = _State()


@contextmanager
def watched_call(loss: "ModelLoss") -> Iterator[WatchedCall]:
    """Records whether the loss is called meanwhile."""
    call, before = WatchedCall(loss), _state.calls
    _state.calls = (*before, call)
    try:
        yield call
    finally:
        _state.calls = before


class ModelLoss:
    """What `model.loss_function` calls: a criterion of logits.

    Args:
        shifts: whether the model's own loss scores position t against label t+1. If not, labels are used as
            they are, as `shift_labels` are, whatever the criterion's own `shift`.
        logits_without_labels: whether the model may be called in training without labels, for its logits.
    """

    def __init__(
        self, criterion: Criterion, shifts: bool = True, logits_without_labels: bool = False
    ) -> None:
        self.criterion = criterion
        self.shifts = shifts
        self.logits_without_labels = logits_without_labels

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
            labels: [B, S]; ignored if there are `shift_labels`.
            vocab_size: ignored: it is V.
            shift_labels: [B, S], the label of the logits at the same place.
            kwargs: what the batch holds for the objective, `token_weight` for example, [B, S]. It lies on the
                grid of the labels that count: with `shift_labels` it must be shifted as they are, otherwise
                it is shifted together with `labels`. Other names are ignored, as transformers does.

        Raises:
            TypeError: the objective needs something that the batch does not hold, or has no use for it.
            ValueError: there are no labels, or `ignore_index` is not the criterion's.
        """
        for call in _state.calls:
            if call.loss is self:
                call.loss_was_called = True
        own_index = getattr(self.criterion, "ignore_index", -100)
        if ignore_index not in (-100, own_index):
            raise ValueError(f"the criterion has ignore_index={own_index}, the model asks for {ignore_index}")
        targets = labels if shift_labels is None else shift_labels
        if targets is None:
            raise ValueError("labels are missing: neither labels nor shift_labels were given")
        inputs = token_inputs(kwargs)
        check_inputs(self.criterion, inputs)
        # A model on several devices computes its logits on the last, while the batch is on the first.
        device = logits.device
        if isinstance(num_items_in_batch, Tensor):
            num_items_in_batch = num_items_in_batch.to(device, non_blocking=True)
        moved = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in inputs.items()}
        inputs = cast(TokenInputs, moved)
        shifted = shift_labels is not None or not self.shifts
        value = self.value(logits, targets.to(device), shifted, num_items_in_batch, inputs)
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
            raise TypeError(
                f"labels that are not to be shifted need a Loss, got {criterion!r}, which shifts them itself"
            )
        return criterion(logits, labels, num_items_in_batch=num_items_in_batch, **inputs)


def share(value: Tensor, num_items_in_batch: Tensor | int | None, criterion: Criterion) -> Tensor:
    """This rank's part of a loss that the `Trainer` adds up over ranks, if it gave a number of tokens."""
    group = getattr(criterion, "process_group", None)
    if group is None or num_items_in_batch is None:
        return value
    from nvamp.distributed import ranks_of  # only here: PyTorch can be built without it

    return value / ranks_of(group).size
