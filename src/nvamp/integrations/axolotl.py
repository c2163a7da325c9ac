"""NVAMP as an Axolotl plugin, which a line of its configuration turns on."""

from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel

from nvamp.integrations.stats import log_stats
from nvamp.integrations.transformers import compute_loss_func
from nvamp.losses import NVAMPLoss
from nvamp.objectives import Gradient

__all__ = ["NVAMPArgs", "NVAMPPlugin"]


class NVAMPArgs(BaseModel):
    """What the plugin adds to Axolotl's configuration: options of `nvamp.NVAMPLoss`."""

    nvamp_alpha: float = 1.0
    nvamp_beta: float = 0.02
    nvamp_gamma: float = 0.001
    nvamp_gradient: Gradient = "scalar"


class NVAMPPlugin(BasePlugin):  # type: ignore[misc]  # axolotl is untyped here
    """Trains with NVAMP, and logs its components.

    The statistics of the loss are those of the micro-batch of a rank.

    Example:
        plugins:
          - nvamp.integrations.axolotl.NVAMPPlugin
        nvamp_gradient: token
    """

    def get_input_args(self) -> str:
        """Where Axolotl finds the options of the plugin."""
        return f"{NVAMPArgs.__module__}.{NVAMPArgs.__qualname__}"

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Makes NVAMP the loss of the trainer.

        Raises:
            ValueError: the trainer has a loss function of another option already.
        """
        if trainer.compute_loss_func is not None:
            raise ValueError(
                f"the trainer has a compute_loss_func already, {trainer.compute_loss_func!r}: "
                "NVAMPPlugin cannot be used with another option that sets a loss, such as use_eaft"
            )
        criterion = NVAMPLoss(cfg.nvamp_alpha, cfg.nvamp_beta, cfg.nvamp_gamma, gradient=cfg.nvamp_gradient)
        trainer.compute_loss_func = compute_loss_func(criterion)
        log_stats(trainer, criterion)
