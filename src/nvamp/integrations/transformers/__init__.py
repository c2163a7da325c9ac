"""Any criterion as the loss of a Hugging Face model or of the `Trainer`."""

from typing import Any, Protocol

from torch import Tensor

from nvamp.integrations.columns import needs_of
from nvamp.integrations.sequences import check_whole_sequences
from nvamp.integrations.transformers.alignment import loss_shifts, own_loss
from nvamp.integrations.transformers.model_loss import Criterion, ModelLoss, check_criterion, share
from nvamp.integrations.transformers.patching import base_model, logits_of, patch, unpatch, watch

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


def compute_loss_func(criterion: Criterion, model: Any = None) -> LossFunction:
    """`criterion` as the `compute_loss_func` of a `Trainer`; the model then computes no loss of its own.

    If the `Trainer` gives the number of tokens of the optimizer step, the loss of a criterion with a
    `process_group` is divided by the size of the group; docs/transformers.md says why.

    Args:
        criterion: called as `criterion(logits [B, S, V], labels [B, S], num_items_in_batch=...)`, returns a
            scalar. It shifts the labels itself, as `nvamp.Loss` does. For models whose own loss scores a
            position against the label at the same place it must be a `nvamp.Loss`, which then does not shift.
        model: the model of the `Trainer`, which runs on six tokens to find out what its own loss does.
            Without it, outputs that hold the state of an encoder and those of models of masked tokens are
            taken to be of such a model. Those of a decoder do not show it: give `BartForCausalLM`,
            `XLNetLMHeadModel` and their like.

    Raises:
        TypeError: a class instead of an instance, or a criterion of something other than logits; the own loss
            of the model is the cross-entropy neither of the next label nor of the same; or, from the loss, an
            argument for which it has no use. It ignores `trainer` and arguments that are None, which ms-swift
            passes.
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
            "loss_function(Loss(...), model), with remove_unused_columns=False in TrainingArguments"
        )
    check_whole_sequences(criterion)

    shifts = None if model is None else own_loss(base_model(model)).shifts
    in_place = ModelLoss(criterion, shifts=False)

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
        if not (_of_next_tokens(outputs) if shifts is None else shifts):
            return in_place(logits_of(outputs), labels, num_items_in_batch=num_items_in_batch)
        value = criterion(logits_of(outputs), labels, num_items_in_batch=num_items_in_batch)
        return share(value, num_items_in_batch, criterion)

    return loss


def _of_next_tokens(outputs: Any) -> bool:
    """Whether outputs may be a causal model's, whose logits predict the next token, by their kind."""
    from transformers.modeling_outputs import MaskedLMOutput

    return not isinstance(outputs, MaskedLMOutput) and not hasattr(outputs, "encoder_last_hidden_state")


def loss_function(criterion: Criterion, model: Any, *, logits_without_labels: bool = False) -> ModelLoss:
    """`criterion` as `model.loss_function`: the model computes its logits, and this is its loss of them.

    It is called as transformers' `ForCausalLMLoss` is, and treats `num_items_in_batch` as `compute_loss_func`
    does. The columns `token_weight`, `advantage`, `old_logprob` and `ref_logprob` of the batch, [B, S] like
    the labels, reach the criterion as keyword arguments, if the model hands its own on to its loss. A
    `Trainer` keeps such columns only with `remove_unused_columns=False`.

    Args:
        criterion: as for `compute_loss_func`. For batches with `shift_labels`, which were shifted before they
            were split over ranks, it must be a `nvamp.Loss`, and the columns above must be shifted too.
        model: the one whose loss this will be, or what wraps it. It runs on six tokens to find out what its
            own loss does. `None`, for a model that cannot run yet, checks nothing.
        logits_without_labels: as for `patch`.

    The model with this loss raises a `RuntimeError` if a call would train it with another: its forward
    computes a loss itself, TRL's own `SFTTrainer` calls it, or it is called in training without labels. For
    that it gets a class of its own, under the same name.

    Raises:
        TypeError: a class instead of an instance, or a criterion of something other than logits; or the model
            computes its loss itself.

    Example:
        model.loss_function = loss_function(Loss(TokenWeighted()), model)
        loss = model(input_ids=tokens, labels=labels, token_weight=token_weight).loss
    """
    check_criterion(criterion)
    if model is None:
        return ModelLoss(criterion, logits_without_labels=logits_without_labels)
    model = base_model(model)
    if not own_loss(model).is_loss_function:
        raise TypeError(
            f"{type(model).__name__} computes its loss itself and ignores model.loss_function: use "
            "patch(model, LinearLoss(...)) or compute_loss_func(Loss(...), model)"
        )
    loss = ModelLoss(criterion, loss_shifts(model), logits_without_labels)
    watch(model)
    return loss
