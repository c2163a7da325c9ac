"""The per-token inputs of an objective among the columns of a batch."""

from collections.abc import Mapping
from typing import Any, cast

from nvamp.apply import TokenInputs
from nvamp.losses import LinearLoss, Loss, TokenLoss

TOKEN_INPUTS = tuple(TokenInputs.__annotations__)


def token_inputs(columns: Mapping[str, Any]) -> TokenInputs:
    """The columns that are per-token inputs."""
    return cast(TokenInputs, {name: columns[name] for name in TOKEN_INPUTS if name in columns})


def needs_of(criterion: object) -> tuple[str, ...]:
    """The columns without which the criterion cannot be computed."""
    return criterion.objective.inputs if isinstance(criterion, Loss | LinearLoss | TokenLoss) else ()


def check_inputs(criterion: object, inputs: TokenInputs) -> None:
    """Raises a `TypeError` if a column that the criterion needs has not come through a `Trainer`."""
    for name in needs_of(criterion):
        if inputs.get(name) is None:
            raise TypeError(
                f"{name} is missing: the criterion needs a column {name!r} in the batch, shaped like the "
                "labels; a Trainer drops the columns that the model's forward does not name, unless "
                "TrainingArguments has remove_unused_columns=False"
            )
