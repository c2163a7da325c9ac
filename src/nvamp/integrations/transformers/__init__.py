"""Any criterion as the loss of a Hugging Face model or of the `Trainer`."""

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

from nvamp.integrations.columns import needs_of
from nvamp.integrations.sequences import check_whole_sequences
from nvamp.integrations.transformers.model_loss import Criterion, ModelLoss, check_criterion, share
from nvamp.integrations.transformers.patching import patch, unpatch, watch_assignments

__all__ = ["Criterion", "LossFunction", "compute_loss_func", "logits_of", "loss_function", "patch", "unpatch"]


class LossFunction(Protocol):
    """What `Trainer(compute_loss_func=...)` calls."""

    def __call__(
        self,
        outputs: Any,
        labels: Tensor | None,
        num_items_in_batch: Tensor | int | None = None,
        *,
        trainer: object = None,
        **extra: object,
    ) -> Tensor: ...


def compute_loss_func(criterion: Criterion) -> LossFunction:
    """`criterion` as the `compute_loss_func` of a `Trainer`; the model then computes no loss of its own.

    If the `Trainer` gives the number of tokens of the optimizer step, the loss of a criterion with a
    `process_group` is divided by the size of the group; docs/transformers.md says why.

    Args:
        criterion: called as `criterion(logits [B, S, V], labels [B, S], num_items_in_batch=...)`, returns a
            scalar. It shifts the labels itself, as `nvamp.Loss` does.

    Raises:
        TypeError: a class instead of an instance, or a criterion of something else than logits; or, from the
            loss, an argument for which it has no use. It ignores `trainer` and arguments that are None, which
            ms-swift passes.
        ValueError: the objective needs per-token inputs, `token_weight` for example. The `Trainer` gives this
            function the labels and no other column of the batch; `loss_function` and `patch` see them. Or
            sequences are split over ranks: under context parallelism the loss raises, unless the criterion
            has `shift=False`. Under sequence parallelism (Ulysses) the `Trainer` does not call it: this
            function raises if `accelerate launch` has set that up, and
            `nvamp.integrations.check.assert_trains_with` in any case.

    A `Trainer` with a `compute_loss_func` drops its own `label_smoothing_factor`: the criterion has
    `label_smoothing`.

    Example:
        Trainer(model, args, train_dataset=data, compute_loss_func=compute_loss_func(Loss(NVAMP())))

        # On several ranks; TrainingArguments makes the group.
        args = TrainingArguments(...)
        criterion = Loss(NVAMP(), process_group=torch.distributed.group.WORLD)
        Trainer(model, args, train_dataset=data, compute_loss_func=compute_loss_func(criterion))
    """
    check_criterion(criterion)
    if needs := needs_of(criterion):
        raise ValueError(
            f"the criterion needs {', '.join(needs)}, but a Trainer gives compute_loss_func the labels and "
            "no other column of the batch: use patch(model, LinearLoss(...)) or model.loss_function = "
            "loss_function(Loss(...)), with remove_unused_columns=False in TrainingArguments"
        )
    check_whole_sequences(criterion)

    def loss(
        outputs: Any,
        labels: Tensor | None,
        num_items_in_batch: Tensor | int | None = None,
        *,
        trainer: object = None,
        **extra: object,
    ) -> Tensor:
        check_whole_sequences(criterion)
        if given := [name for name, value in extra.items() if value is not None]:
            raise TypeError(f"{', '.join(given)}: compute_loss_func has no use for it, so it must be None")
        if labels is None:
            raise ValueError("labels are missing: the batches of the Trainer need a column named 'labels'")
        value = criterion(logits_of(outputs), labels, num_items_in_batch=num_items_in_batch)
        return share(value, num_items_in_batch, criterion)

    return loss


def loss_function(criterion: Criterion, *, logits_without_labels: bool = False) -> ModelLoss:
    """`criterion` as `model.loss_function`: the model computes its logits, and this is its loss of them.

    It is called as transformers' `ForCausalLMLoss` is, and treats `num_items_in_batch` as `compute_loss_func`
    does. The columns `token_weight`, `advantage`, `old_logprob` and `ref_logprob` of the batch, [B, S] like
    the labels, reach the criterion as keyword arguments, if the model hands its own on to its loss. A
    `Trainer` keeps such columns only with `remove_unused_columns=False`.

    Args:
        criterion: as for `compute_loss_func`. For batches with `shift_labels`, which were shifted before they
            were split over ranks, it must be a `nvamp.Loss`, and the columns above must be shifted too.
        logits_without_labels: as for `patch`.

    A model with this loss raises a `RuntimeError` if a call would train it with another: its forward computes
    a loss itself, TRL's own `SFTTrainer` calls it, or it is called in training without labels. For that the
    assignment gives it a class of its own, under the same name.

    Raises:
        TypeError: a class instead of an instance, or a criterion of something else than logits.

    Example:
        model.loss_function = loss_function(Loss(TokenWeighted()))
        loss = model(input_ids=tokens, labels=labels, token_weight=token_weight).loss
    """
    check_criterion(criterion)
    watch_assignments()
    return ModelLoss(criterion, logits_without_labels)


def logits_of(outputs: Any) -> Tensor:
    """The logits [B, S, V] that a model returned, as a `ModelOutput`, a dict or a tuple without a loss."""
    logits: Tensor = outputs["logits"] if isinstance(outputs, Mapping) else outputs[0]
    return logits
