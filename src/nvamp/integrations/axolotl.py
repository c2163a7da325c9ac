"""Any objective as a loss in Axolotl: a plugin that two lines of its configuration turn on."""

from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel, field_validator

from nvamp.integrations.stats import log_stats
from nvamp.integrations.transformers import compute_loss_func
from nvamp.losses import Loss
from nvamp.objectives.spec import parse_loss

__all__ = ["NVAMPArgs", "NVAMPPlugin"]


class NVAMPArgs(BaseModel):
    """What the plugin adds to Axolotl's configuration.

    Attributes:
        nvamp_loss: an objective as `nvamp.objectives.parse` reads it, with options of the loss of a token
            (`nvamp.functional.TokenOptions`) among its own. An objective that needs columns of the batch
            beside the labels, such as `token_weighted`, is refused.
    """

    nvamp_loss: str = "nvamp"

    @field_validator("nvamp_loss")
    @classmethod
    def _check_loss(cls, text: str) -> str:
        compute_loss_func(_criterion(text))
        return text


class NVAMPPlugin(BasePlugin):  # type: ignore[misc]  # axolotl is untyped here
    """Trains with any objective of nvamp, and logs what its loss is made of.

    The statistics of the loss are those of a rank's micro-batch.

    Example:
        plugins:
          - nvamp.integrations.axolotl.NVAMPPlugin
        nvamp_loss: nvamp:gamma=0.04,tail=0.05
    """

    def get_input_args(self) -> str:
        """The name of the class that declares the plugin's options."""
        return f"{NVAMPArgs.__module__}.{NVAMPArgs.__qualname__}"

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Sets the loss of the trainer.

        Raises:
            ValueError: the trainer already has a loss function, from another option.
        """
        if trainer.compute_loss_func is not None:
            raise ValueError(
                f"the trainer already has a compute_loss_func, {trainer.compute_loss_func!r}: "
                "NVAMPPlugin excludes other options that set a loss, such as use_eaft"
            )
        criterion = _criterion(cfg.nvamp_loss)
        trainer.compute_loss_func = compute_loss_func(criterion)
        log_stats(trainer, criterion)


def _criterion(text: str) -> Loss:
    objective, token_options = parse_loss(text)
    return Loss(objective, **token_options)
