"""NVAMP as a loss of torchtitan's configuration."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor
from torchtitan.components.loss import IGNORE_INDEX, BaseLoss, compute_logprobs
from torchtitan.distributed.spmd_types import spmd_mesh_size

from nvamp.distributed import ranks_of
from nvamp.functional import token_nll
from nvamp.losses import TokenNVAMPLoss
from nvamp.objectives import Gradient

__all__ = ["NVAMPLoss"]


class NVAMPLoss(BaseLoss):  # type: ignore[misc]  # torchtitan is untyped here
    """A torchtitan loss: what every rank gets of every micro-batch adds up to the loss of the step.

    The statistics are those of the micro-batch of a rank, or of a chunk where `ChunkedLossWrapper` calls it.
    `criterion.process_group` makes them those of several ranks, which hold different tokens:
    `trainer.loss_fn.criterion.process_group = trainer.parallel_dims.get_mesh("loss")`.

    Logits that are a DTensor sharded over the vocabulary stay so. Those of `spmd_types`, plain tensors, are
    gathered by torchtitan's own `compute_logprobs`. The configuration of the compiler is not followed: there
    is nothing to fuse.

    Example:
        Trainer.Config(loss=NVAMPLoss.Config(gradient="token"), ...)
        Trainer.Config(loss=ChunkedLossWrapper.Config(loss_fn=NVAMPLoss.Config()), ...)
    """

    @dataclass(kw_only=True, slots=True)
    class Config(BaseLoss.Config):  # type: ignore[misc]
        """The options of `nvamp.TokenNVAMPLoss`."""

        alpha: float = 1.0
        beta: float = 0.02
        gamma: float = 0.001
        eps: float = 1e-6
        gradient: Gradient = "scalar"

    def __init__(self, config: Config, *, compile_config: Any = None) -> None:
        self.criterion = TokenNVAMPLoss(
            config.alpha, config.beta, config.gamma, config.eps, gradient=config.gradient
        )

    def __call__(
        self, pred: Tensor, labels: Tensor, global_valid_tokens: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and no metrics.

        Args:
            pred: logits [batch, seq, vocab].
            labels: [batch, seq], shifted already, as torchtitan's data has them.
            global_valid_tokens: of the whole step, on all ranks. Without it the loss is not divided by any
                number of tokens, as those of torchtitan.
            kwargs: what torchtitan hands to every loss; not used.
        """
        gathers = not isinstance(pred, DTensor) and spmd_mesh_size("tp") > 1
        nll = -compute_logprobs(pred, labels) if gathers else token_nll(pred, labels)
        items = 1 if global_valid_tokens is None else global_valid_tokens
        loss = self.criterion(nll, labels != IGNORE_INDEX, num_items_in_batch=items)
        group = self.criterion.process_group
        return loss / (1 if group is None else ranks_of(group).size), {}
