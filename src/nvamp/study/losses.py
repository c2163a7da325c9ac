"""The losses of a study from their text: `ce`, `nvamp:gradient=token`, `ce:label_smoothing=0.1`."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import nvamp
from nvamp.integrations.transformers import Criterion
from nvamp.objectives import GRADIENTS, NVAMP, OBJECTIVES
from nvamp.objectives.spec import LossSpec
from nvamp.objectives.spec import parse_loss as parse_spec
from nvamp.study import StudyError

# The objectives that need nothing of a token beside its loss: text has no more.
KNOWN = tuple(name for name, objective in OBJECTIVES.items() if not objective().inputs)
WORDS = {"ce": "cross-entropy", "nvamp": "NVAMP", "gce": "GCE", "dft": "DFT"}  # the others read as they are
MODES = tuple(str(NVAMP(gradient=gradient)) for gradient in GRADIENTS)


@dataclass(frozen=True)
class Loss:
    """A loss to train with.

    Attributes:
        spec: the objective and the options of the loss of a token.
        criterion: `(logits [B, S, V], labels [B, S], num_items_in_batch) -> scalar`; it shifts the labels.
    """

    spec: LossSpec
    criterion: Criterion

    @property
    def name(self) -> str:
        """The canonical text, the same for all spellings of one loss."""
        return str(self.spec)

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
    try:
        spec = parse_spec(text)
    except ValueError as error:
        raise StudyError(f"--loss {text}: {str(error).removeprefix(f'{text!r}: ')}") from error
    if spec.objective.inputs:
        needed = ", ".join(spec.objective.inputs)
        raise StudyError(f"--loss {text}: needs {needed} of every token, which text alone does not have")
    return Loss(spec, nvamp.Loss(spec.objective, **spec.token_options))


def in_words(name: str) -> str:
    """The name of a loss for a sentence: `NVAMP with gamma 0.04, tail 0.05`."""
    objective, _, options = name.partition(":")
    words = options.replace("=", " ").replace("_", " ").replace(",", ", ")
    return WORDS.get(objective, objective) + (f" with {words}" if words else "")
