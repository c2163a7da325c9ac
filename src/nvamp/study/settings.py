"""What the user asks of a study, checked without PyTorch: a wrong option need not wait for it."""

from dataclasses import dataclass
from importlib.util import find_spec
from math import inf
from typing import Any

from nvamp.study import StudyError
from nvamp.study.extra import install_command

LOSS_ON = ("all", "completions")
NO_COMPLETIONS = "--loss-on completions: expected messages, or prompt and completion, got text"


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters of the linear layers, except the output layer.

    Attributes:
        r: their rank.
        alpha: what they add is scaled by alpha / r.
    """

    r: int
    alpha: int

    @classmethod
    def parse(cls, text: str) -> "Lora":
        """From `r` or `r,alpha`; alpha is twice the rank if it is left out."""
        r, comma, alpha = text.partition(",")
        numbers = (r, alpha) if comma else (r,)
        if not all(number.strip().isdecimal() and int(number) > 0 for number in numbers):
            raise StudyError(f"--lora {text}: expected r or r,alpha, such as 8 or 8,16")
        return cls(int(r), int(alpha) if comma else 2 * int(r))

    def __str__(self) -> str:
        return f"{self.r},{self.alpha}"

    def adapt(self, model: Any) -> Any:
        """The model with fresh adapters, a `PeftModel`; the rest of it is frozen."""
        import peft  # an extra

        config = peft.LoraConfig(
            r=self.r, lora_alpha=self.alpha, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        return peft.get_peft_model(model, config)


@dataclass(frozen=True)
class Settings:
    """What the user asks of a study; the fields are the options of `nvamp compare`.

    Attributes:
        losses: specs; the first one is the baseline.
        seeds: the number of seeds, which are 0, 1, ...
        steps: `None` for the default, or if there are epochs.
        lr: of a loss without one of its own; `None` for the default.
        sequence: `None` for the default.
        lora: "r" or "r,alpha".
        loss_on: which tokens of examples are learned, of `LOSS_ON`; `None` for the default.
        special_tokens: whether special tokens that the text spells out are such, or else text.
        also: a file or directory of another text, on which models are evaluated before and after training.
        generate: the most held-out prompts to complete.
    """

    losses: tuple[str, ...]
    seeds: int
    steps: int | None
    batch_size: int
    lr: float | None = None
    noise: float = 0.0
    model: str | None = None
    text: tuple[str, ...] = ()
    dataset: tuple[str, ...] = ()
    epochs: float | None = None
    accumulate: int = 1
    sequence: int | None = None
    lora: str | None = None
    bf16: bool = False
    gradient_checkpointing: bool = False
    loss_on: str | None = None
    special_tokens: bool = False
    also: str | None = None
    generate: int = 0

    def check(self) -> None:
        """Raise a `StudyError` if an option is out of range."""
        counts = {"seeds": 1, "steps": 1, "batch_size": 1, "accumulate": 1, "sequence": 2}
        for name, least in counts.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise StudyError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
        for name in ("lr", "epochs"):
            value = getattr(self, name)
            if value is not None and not 0 < value < inf:
                raise StudyError(f"--{name} must be finite and positive, got {value:g}")
        if self.steps is not None and self.epochs is not None:
            raise StudyError("--steps and --epochs exclude each other")
        if not 0 <= self.noise <= 1:
            raise StudyError(f"--noise must be between 0 and 1, got {self.noise:g}")
        if self.generate < 0:
            raise StudyError(f"--generate must be at least 0, got {self.generate}")
        if not self.losses:
            raise StudyError("--loss: expected at least one")
        if self.loss_on not in (None, *LOSS_ON):
            raise StudyError(f"--loss-on: expected {' or '.join(LOSS_ON)}, got {self.loss_on}")
        if self.loss_on == "completions" and not self.dataset:
            raise StudyError(NO_COMPLETIONS)
        if self.text and self.dataset:
            raise StudyError("--text and --dataset exclude each other")
        if self.lora is not None:
            Lora.parse(self.lora)
            if self.model is None:
                raise StudyError("--lora adapts a trained model: name one with --model")
            if find_spec("peft") is None:
                raise StudyError(f"--lora needs peft, which is not installed: {install_command('lora')}")
