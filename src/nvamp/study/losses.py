"""The losses of a study from their text: `ce`, `nvamp:gradient=token`, `ce:label_smoothing=0.1@1e-4`."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING

import nvamp
from nvamp.objectives import GRADIENTS, NVAMP, OBJECTIVES
from nvamp.objectives.spec import LossSpec
from nvamp.objectives.spec import parse_loss as parse_spec
from nvamp.study import StudyError

if TYPE_CHECKING:  # it would import transformers, for which a wrong loss need not wait
    from nvamp.integrations.transformers import Criterion

# The objectives that need nothing of a token beside its loss: text has no more.
KNOWN = tuple(name for name, objective in OBJECTIVES.items() if not objective().inputs)
WORDS = {"ce": "cross-entropy", "nvamp": "NVAMP", "gce": "GCE", "dft": "DFT"}  # the others read as they are
MODES = tuple(str(NVAMP(gradient=gradient)) for gradient in GRADIENTS)


@dataclass(frozen=True)
class Loss:
    """A loss to train with.

    Attributes:
        spec: the objective and the options of the loss of a token.
        own: a criterion of logits to train with in place of what `spec` describes.
        lr: the peak learning rate with it; `None` for the study's.
    """

    spec: LossSpec
    own: "Criterion | None" = None
    lr: float | None = None

    @property
    def criterion(self) -> "Criterion":
        """The loss of logits; it shifts the labels."""
        return self.own or nvamp.Loss(self.spec.objective, **self.spec.token_options)

    @property
    def linear(self) -> nvamp.LinearLoss:
        """What `spec` describes, from hidden states and without logits."""
        return nvamp.LinearLoss(self.spec.objective, **self.spec.token_options)

    @property
    def name(self) -> str:
        """The canonical text, the same for all spellings of one loss."""
        return str(self.spec) if self.lr is None else f"{self.spec}@{self.lr}"

    @property
    def slug(self) -> str:
        """The name, fit for a file name."""
        return re.sub(r"[:,]", "-", self.name)


def parse_losses(texts: Sequence[str]) -> list[Loss]:
    """The losses that the texts describe, in their order.

    Raises:
        StudyError: a text describes no loss, or the same one as another.
    """
    losses = [parse_loss(text) for text in texts]
    names = [loss.name for loss in losses]
    for i, name in enumerate(names):
        if name in names[:i]:
            raise StudyError(f"--loss {texts[i]}: named twice")
    return losses


def parse_loss(text: str) -> Loss:
    """The loss that a text describes; a `StudyError` if there is none, or if it needs more than text."""
    described, at, rate = text.partition("@")
    try:
        spec = parse_spec(described)
    except ValueError as error:
        raise StudyError(f"--loss {text}: {str(error).removeprefix(f'{described!r}: ')}") from error
    if spec.objective.inputs:
        needed = ", ".join(spec.objective.inputs)
        raise StudyError(f"--loss {text}: needs {needed} of every token, which text alone does not have")
    return Loss(spec, lr=_rate(text, rate) if at else None)


def _rate(text: str, rate: str) -> float:
    try:
        lr = float(rate)
    except ValueError:
        lr = 0.0
    if not 0 < lr < inf:
        raise StudyError(f"--loss {text}: expected a positive learning rate after @, got {rate!r}")
    return lr


def in_words(name: str) -> str:
    """The name of a loss for a sentence: `NVAMP with gamma 0.04, tail 0.05`."""
    spec, _, rate = name.partition("@")
    objective, _, options = spec.partition(":")
    words = options.replace("=", " ").replace("_", " ").replace(",", ", ")
    at = f" at a learning rate of {rate}" if rate else ""
    return WORDS.get(objective, objective) + (f" with {words}" if words else "") + at
