"""One check before a long run: does a training step take its loss from the criterion?"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nvamp.integrations.columns import needs_of
from nvamp.integrations.modes import in_mode
from nvamp.integrations.sequences import check_whole_sequences
from nvamp.integrations.transformers.patching import installed_loss
from nvamp.losses import LinearLoss, Loss, TokenLoss

__all__ = ["assert_trains_with", "check_arguments"]


def assert_trains_with(
    trained: Any, criterion: Loss | LinearLoss | TokenLoss, batch: Mapping[str, Any] | None = None
) -> None:
    """Raises unless a training step takes its loss from this criterion: one forward pass shows it.

    It looks at the arguments of a trainer first, then computes the loss of one batch as in training, without
    a backward pass. Weights, random state, modes and what the trainer logs stay as they are. With several
    ranks all of them must call it, before the training, when the trainer has not sharded its model.

    Args:
        trained: a `transformers.Trainer` or one derived from it, whose `compute_loss` is called; or a model
            with a criterion from `patch` or `loss_function`, or what wraps one.
        criterion: the object that was given to the trainer or the model, not one like it.
        batch: the arguments of the model, with labels. By default the first batch of the trainer; for a model
            four tokens as text, with ones for the other inputs of the objective.

    Raises:
        AssertionError: the loss is not the criterion's.
        ValueError: arguments of the trainer under which it would not be; see `check_arguments`.

    Example:
        trainer = Trainer(model, args, train_dataset=data, compute_loss_func=compute_loss_func(criterion))
        assert_trains_with(trainer, criterion)
        trainer.train()
    """
    is_trainer = not isinstance(trained, nn.Module)
    model = trained.model if is_trainer else trained
    if is_trainer:
        check_arguments(trained, criterion)
    gpus = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(gpus), in_mode(model, True), _counted(criterion) as calls, torch.enable_grad():
        loss = _of_trainer(trained, batch) if is_trainer else _of_model(model, criterion, batch)
    name = f"{type(trained).__name__} does not train with this {type(criterion).__name__}"
    if not calls:
        raise AssertionError(f"{name}: its loss was computed without a call of it")
    if not _comes_from_a_criterion(loss):
        raise AssertionError(f"{name}: it was called, but the loss is not made of what it returned")


def check_arguments(trainer: Any, criterion: object) -> None:
    """Raises a `ValueError` if arguments of a `Trainer` keep it from training with the criterion as it is.

    It reads attributes only, so it costs nothing.
    """
    own = trainer.compute_loss_func is not None
    if trainer.label_smoother is not None:
        what = "is dropped by compute_loss_func" if own else "replaces the criterion by another loss"
        raise ValueError(
            f"label_smoothing_factor={trainer.args.label_smoothing_factor} {what}: leave it out, and give "
            "the criterion label_smoothing"
        )
    if own:
        check_whole_sequences(criterion, getattr(trainer.accelerator, "parallelism_config", None))
    kernels = trainer.args.liger_kernel_config or {}
    liger = trainer.args.use_liger_kernel and kernels.get("fused_linear_cross_entropy", True)
    if liger and not own and installed_loss(trainer.model) is not None:
        raise ValueError(
            "use_liger_kernel replaces the criterion by Liger's fused cross-entropy: give TrainingArguments "
            'liger_kernel_config={"fused_linear_cross_entropy": False}'
        )


def _of_trainer(trainer: Any, batch: Mapping[str, Any] | None) -> Any:
    """The loss of a training step, of a copy that keeps the trainer's metrics as they are."""
    trainer = copy.copy(trainer)
    if hasattr(trainer, "_metrics"):  # TRL's
        trainer._metrics = copy.deepcopy(trainer._metrics)
    first = _first_of(trainer.get_train_dataloader()) if batch is None else dict(batch)
    (inputs,), items = trainer.get_batch_samples(iter([first]), 1, trainer.args.device)
    with trainer.compute_loss_context_manager():
        return trainer.compute_loss(trainer.model, trainer._prepare_inputs(inputs), num_items_in_batch=items)


def _first_of(loader: Any) -> Any:
    batch = next(iter(loader))
    if hasattr(loader, "end"):  # Accelerate counts the loaders that are being read
        loader.end()
    return batch


def _of_model(model: Any, criterion: object, batch: Mapping[str, Any] | None) -> Any:
    if batch is None:
        device = next(model.parameters()).device
        tokens = torch.arange(3, 7, device=device)[None]
        batch = {"input_ids": tokens, "labels": tokens}
        batch |= {name: torch.ones(tokens.shape, device=device) for name in needs_of(criterion)}
    outputs = model(**batch)
    return outputs["loss"] if isinstance(outputs, Mapping) else outputs[0]


@contextmanager
def _counted(criterion: Loss | LinearLoss | TokenLoss) -> Iterator[list[object]]:
    """The statistics of every call of the criterion, which its own listener does not hear meanwhile."""
    calls: list[object] = []
    before, criterion.on_stats = criterion.on_stats, calls.append
    try:
        yield calls
    finally:
        criterion.on_stats = before


def _comes_from_a_criterion(loss: Any) -> bool:
    """Whether the gradient of the loss passes through that of a loss of this library."""
    todo = [loss.grad_fn] if isinstance(loss, Tensor) else []
    seen = set(todo)
    while todo:
        node = todo.pop()
        # A compiled model is one node.
        if node is not None and node.name().startswith(("_ValueWithGradient", "CompiledFunction")):
            return True
        further = {following for following, _ in node.next_functions} - seen if node is not None else set()
        seen |= further
        todo += further
    return False
