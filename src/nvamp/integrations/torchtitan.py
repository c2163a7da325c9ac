"""Any objective as a loss of torchtitan's configuration."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor
from torchtitan.components.loss import IGNORE_INDEX, BaseLoss, ChunkedLossWrapper, compute_logprobs
from torchtitan.distributed.spmd_types import spmd_mesh_size

from nvamp.distributed import ranks_of
from nvamp.functional import TokenMetrics, token_nll
from nvamp.integrations.columns import token_inputs
from nvamp.losses import TokenLoss
from nvamp.objectives.spec import parse_loss

__all__ = ["TitanLoss", "criterion_of"]


class TitanLoss(BaseLoss):  # type: ignore[misc]  # torchtitan is untyped here
    """Any objective for torchtitan: the losses of micro-batches and ranks add up to the loss of the step.

    Statistics are those of a rank's micro-batch, or of a chunk if `ChunkedLossWrapper` calls the loss. To
    take them over several ranks that hold different tokens, set the group of the criterion:
    `criterion_of(trainer.loss_fn).process_group = trainer.parallel_dims.get_mesh("loss")`.

    Logits that are a DTensor sharded over the vocabulary stay sharded. torchtitan's own `compute_logprobs`
    gathers those of `spmd_types`, which are plain tensors. The configuration of the compiler is ignored,
    because there is nothing to fuse.

    Attributes:
        criterion: the `nvamp.TokenLoss`.

    Example:
        Trainer.Config(loss=TitanLoss.Config(loss="nvamp:gradient=token"), ...)
        Trainer.Config(loss=ChunkedLossWrapper.Config(loss_fn=TitanLoss.Config(loss="dft")), ...)
    """

    @dataclass(kw_only=True, slots=True)
    class Config(BaseLoss.Config):  # type: ignore[misc]
        """Which loss.

        Raises:
            ValueError: a text that describes none.
        """

        loss: str = "nvamp"
        """An objective as `nvamp.objectives.parse` reads it, with options of the loss of a token
        (`nvamp.functional.TokenOptions`) among its own: `nvamp:gamma=0.04,tail=0.05,label_smoothing=0.1`."""

        metrics: bool = False
        """Return metrics beside the loss, from the same pass over the logits: see `TitanLoss.__call__`."""

        def __post_init__(self) -> None:
            parse_loss(self.loss)

    def __init__(self, config: Config, *, compile_config: Any = None) -> None:
        objective, self._token_options = parse_loss(config.loss)
        self.criterion = TokenLoss(objective)
        self._metrics = config.metrics

    def __call__(
        self, pred: Tensor, labels: Tensor, global_valid_tokens: Tensor | None = None, **loss_inputs: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and its metrics; none by default.

        With `Config.metrics`, "nvamp_cross_entropy/mean", "nvamp_entropy/mean" (nats) and
        "nvamp_accuracy/mean" are sums over the tokens of the call, divided like the loss, so that those of
        chunks, micro-batches and ranks add up; "nvamp_loss/max" is the largest loss of a token. torchtitan's
        own `Trainer` drops what a loss returns; its trainer for reinforcement learning logs it.

        Args:
            pred: logits [batch, seq, vocab].
            labels: [batch, seq], already shifted by torchtitan's data loader.
            global_valid_tokens: the tokens of the whole step, on all ranks. Without it the loss is not
                divided by any number of tokens, like torchtitan's own.
            loss_inputs: what the objective needs of each token, `token_weight` for example, [batch, seq],
                shifted as the labels are. Other names are ignored.

        Raises:
            NotImplementedError: a loss that `compute_logprobs` does not compute, or metrics, on a vocabulary
                in parts of `spmd_types`.
        """
        nll, found = self._losses(pred, labels)
        items = 1 if global_valid_tokens is None else global_valid_tokens
        entropy = None if found is None else found.entropy
        loss = self.criterion(
            nll, labels != IGNORE_INDEX, items, entropy=entropy, **token_inputs(loss_inputs)
        )
        group = self.criterion.process_group
        metrics = _metrics(nll, found, items) if self._metrics and found is not None else {}
        return loss / (1 if group is None else ranks_of(group).size), metrics

    def _losses(self, pred: Tensor, labels: Tensor) -> tuple[Tensor, TokenMetrics | None]:
        """The losses [batch, seq] of the tokens, and their metrics if something needs them."""
        needs_entropy = self.criterion.objective.needs_entropy
        if not isinstance(pred, DTensor) and spmd_mesh_size("tp") > 1:
            if needs_entropy or self._metrics or self._token_options:
                needs = "the entropy" if needs_entropy else ", ".join(self._token_options) or "metrics"
                raise NotImplementedError(
                    f"the loss needs {needs}, which torchtitan does not compute of a vocabulary that "
                    "spmd_types has split over ranks"
                )
            return -compute_logprobs(pred, labels), None
        if not (needs_entropy or self._metrics):
            return token_nll(pred, labels, **self._token_options), None
        return token_nll(pred, labels, return_metrics=True, **self._token_options)


def _metrics(nll: Tensor, found: TokenMetrics, items: Tensor | int) -> dict[str, Tensor]:
    """The metrics of tokens [batch, seq], of which those without a label have zeros, over `items` tokens."""
    means = {"cross_entropy": nll, "accuracy": found.correct, "entropy": found.entropy}
    metrics = {f"nvamp_{name}/mean": x.detach().to(nll.dtype).sum() / items for name, x in means.items()}
    return {**metrics, "nvamp_loss/max": nll.detach().max()}


def criterion_of(loss: BaseLoss) -> TokenLoss:
    """The criterion of a trainer's `loss_fn`: a `TitanLoss`, or a `ChunkedLossWrapper` of one.

    Raises:
        TypeError: the loss is not this library's, so the trainer trains with another.
    """
    inner = loss.loss_fn if isinstance(loss, ChunkedLossWrapper) else loss
    if not isinstance(inner, TitanLoss):
        raise TypeError(f"loss must be a TitanLoss or a wrapper of one, got {type(inner).__name__}")
    return inner.criterion
