"""What the loss is made of, in the logs of a `Trainer` of transformers, TRL or Axolotl."""

import warnings
from typing import Any

import torch
from torch import Tensor

from nvamp.apply import NVAMPStats
from nvamp.integrations.check import check_arguments
from nvamp.losses import LinearLoss, Loss, TokenLoss

__all__ = ["log_stats"]

# Token-weighted means and what `NVAMPStats` calls them; `nvamp_max` is logged beside them.
_MEANS = {"cross_entropy": "mean", "dispersion": "dispersion", "std": "std", "hardest_share": "hardest_share"}
_METRICS = {"accuracy": "accuracy", "entropy": "entropy"}


def log_stats(trainer: Any, criterion: Loss | LinearLoss | TokenLoss, *, token_metrics: bool = False) -> None:
    """Adds the components of the loss to everything that `trainer` logs, in training and in evaluation.

    They go where its other values go: to `log_history`, to TensorBoard and to whatever else `report_to`
    names. The keys are the same for every objective, and begin with the name of this library. Each value
    covers all micro-batches since the last log, on all ranks; a mean over micro-batches weighs each of them
    by its number of tokens:

        nvamp_cross_entropy   mean loss ℓ of a token, in nats, whatever its weight
        nvamp_dispersion      mean over micro-batches of their mean |ℓ − μ|/σ
        nvamp_std             mean over micro-batches of their σ, in nats
        nvamp_hardest_share   mean over micro-batches of the part of Σ |∂L/∂ℓ| that falls to the 1% of their
                              tokens with the largest losses
        nvamp_max             the largest loss, in nats

    and with `token_metrics`, from the pass over the logits that computes the losses, patched models included:

        nvamp_accuracy        share of the tokens whose label is the likeliest class
        nvamp_entropy         mean entropy of the predictions, in nats

    A micro-batch is one rank's. With a `process_group` it is the one of all its ranks together, except for
    the share.

    Nothing waits for the device until the trainer logs. Then the values are read, on several ranks after one
    all-gather of six numbers, or eight. All ranks must log at the same steps, as a `Trainer` does.

    Args:
        trainer: a `transformers.Trainer`, or one derived from it. A callback could not do this, because
            those that report run before a user's.
        criterion: the one that the trainer, or its model, computes. Its `on_stats` is set, and its
            `token_metrics`.
        token_metrics: log accuracy and entropy as well. Not for a `TokenLoss`, which sees no predictions.

    Raises:
        TypeError: `token_metrics` with a `TokenLoss`.
        ValueError: arguments of the trainer keep it from training with the criterion; see
            `nvamp.integrations.check.check_arguments`.

    Warns:
        UserWarning: at a log, if the criterion has not been called in training since the last one.

    Example:
        criterion = Loss(Tail(share=0.05))
        trainer = Trainer(model, args, train_dataset=data, compute_loss_func=compute_loss_func(criterion))
        log_stats(trainer, criterion)
    """
    check_arguments(trainer, criterion)
    if token_metrics and isinstance(criterion, TokenLoss):
        raise TypeError(
            "token_metrics need a Loss or a LinearLoss, got a TokenLoss, which sees no predictions"
        )
    means = _MEANS | _METRICS if token_metrics else _MEANS
    meter, log = _Meter(tuple(means.values())), trainer.log
    criterion.on_stats = meter.add
    if isinstance(criterion, Loss | LinearLoss):
        criterion.token_metrics = token_metrics

    def log_with_stats(logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        prefix = _prefix(logs)
        if prefix is not None:
            table = meter.take(training=not prefix, device=trainer.args.device)
            of_ranks = trainer.accelerator.gather(table).view(-1, len(table)).cpu()
            values = _summary(of_ranks, tuple(means))
            logs.update({f"{prefix}nvamp_{name}": value for name, value in values.items()})
        log(logs, *args, **kwargs)

    trainer.log = log_with_stats


def _prefix(logs: dict[str, float]) -> str | None:
    """The prefix of what an evaluation logs, such as "eval_"; "" in training, and `None` for other logs."""
    if "loss" in logs:
        return ""
    prefixes = (key.removesuffix("loss") for key in logs if key.endswith("_loss"))
    return next((prefix for prefix in prefixes if prefix != "train_"), None)


def _summary(tables: Tensor, names: tuple[str, ...]) -> dict[str, float]:
    """The values to log, from the tables of all ranks, one row each; none if no token was scored."""
    tokens, *sums = tables[:, :-1].sum(0).tolist()
    if tokens == 0:
        return {}
    means = {name: total / tokens for name, total in zip(names, sums, strict=True)}
    return means | {"max": tables[:, -1].max().item()}


class _Meter:
    """Adds up the statistics of every call of a criterion, on its device.

    It holds a table for training and one for evaluation: tokens, tokens times each of the means, and the
    largest loss.
    """

    def __init__(self, means: tuple[str, ...]) -> None:
        self._means = means  # fields of `NVAMPStats`
        self._tables: dict[bool, Tensor] = {}

    def add(self, s: NVAMPStats) -> None:
        tokens = s.num_tokens.to(s.mean.dtype)
        # s.mean and not s.cross_entropy, which is divided by the tokens of the whole step.
        means = [getattr(s, name) for name in self._means]
        sums = tokens * torch.stack([torch.ones_like(s.mean), *means])
        table = torch.cat((sums, torch.where(tokens > 0, s.max, -torch.inf)[None]))
        training = torch.is_grad_enabled()
        if (before := self._tables.get(training)) is not None:
            table = torch.cat((before[:-1] + sums, torch.maximum(before[-1:], table[-1:])))
        self._tables[training] = table

    def take(self, training: bool, device: torch.device) -> Tensor:
        """The table of everything since the last call."""
        if training and training not in self._tables:
            warnings.warn(
                "log_stats: since the last log the trainer has not called the criterion", stacklevel=3
            )
        empty = torch.tensor([0.0] * (1 + len(self._means)) + [-torch.inf])
        return self._tables.pop(training, empty).to(device)
