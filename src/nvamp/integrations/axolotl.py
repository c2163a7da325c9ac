"""Any objective as a loss in Axolotl: a plugin that two lines of its configuration turn on."""

from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel, field_validator, model_validator

from nvamp.integrations.stats import log_stats
from nvamp.integrations.transformers import compute_loss_func, loss_function
from nvamp.losses import Loss
from nvamp.objectives.spec import parse_loss

__all__ = ["NVAMPArgs", "NVAMPPlugin"]


class NVAMPArgs(BaseModel):
    """What the plugin adds to Axolotl's configuration.

    Attributes:
        nvamp_loss: an objective as `nvamp.objectives.parse` reads it, with options of the loss of a token
            (`nvamp.functional.TokenOptions`) among its own. An objective that needs columns of the batch
            beside the labels, such as `token_weighted`, is refused. It has no default, so that a misspelt key
            is an error; so are other keys that begin with "nvamp".
    """

    nvamp_loss: str

    @model_validator(mode="before")
    @classmethod
    def _check_keys(cls, configuration: Any) -> Any:
        unknown = [k for k in configuration if k.lower().startswith("nvamp") and k not in cls.model_fields]
        if unknown:
            raise ValueError(
                f"unknown options {', '.join(unknown)}: the plugin's only one is nvamp_loss, whose text "
                "holds those of the objective, such as nvamp:alpha=0.5"
            )
        for key in ("rl", "reward_model", "process_reward_model"):
            if value := configuration.get(key):
                raise ValueError(
                    f"{key}: {value} trains a loss of its own: NVAMPPlugin is for training on labels alone"
                )
        return configuration

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
        """Sets the loss of the trainer, or of a mixture of experts, which adds its router's loss to it.

        Raises:
            TypeError: a mixture of experts computes its loss itself.
            ValueError: the trainer already has a loss, from another option.
        """
        for name in ("compute_loss_func", "label_smoother"):
            other = getattr(trainer, name, None)
            if other is not None:
                raise ValueError(
                    f"the trainer already has a {name}, {other!r}: NVAMPPlugin excludes other options that "
                    "set a loss, such as use_eaft and label_smoothing_factor"
                )
        criterion = _criterion(cfg.nvamp_loss)
        model = trainer.model
        if getattr(model.config.get_text_config(), "output_router_logits", False):
            base = model.get_base_model() if hasattr(model, "get_base_model") else model
            base.loss_function = loss_function(criterion, model)
        else:
            trainer.compute_loss_func = compute_loss_func(criterion)
        log_stats(trainer, criterion)


def _criterion(text: str) -> Loss:
    objective, token_options = parse_loss(text)
    return Loss(objective, **token_options)
