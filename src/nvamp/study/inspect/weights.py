"""The weights that a loss gives the tokens of a text, with the text as one batch."""

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from nvamp import TokenLoss
from nvamp.functional import token_weights
from nvamp.objectives import NVAMP, Objective
from nvamp.objectives.spec import LossSpec

COEFFICIENTS = ("alpha", "beta", "gamma")


class Term(NamedTuple):
    """A term of a loss: the loss is the sum of its terms, each times its coefficient.

    Attributes:
        name: what the coefficient is called, `None` if the loss has a single term without one.
        coefficient: what the loss has.
        value: of the term, in nats.
        weights: [tokens] float64, the derivative of `value` with respect to the loss of each token.
    """

    name: str | None
    coefficient: float
    value: float
    weights: NDArray[np.float64]


class Weights(NamedTuple):
    """What a loss makes of the tokens of a text."""

    spec: LossSpec
    terms: list[Term]


def weigh(spec: LossSpec, ell: NDArray[np.float32], entropy: NDArray[np.float32]) -> Weights:
    """The weights that a loss gives the tokens.

    Args:
        ell: [tokens] their losses in nats, with the token options of `spec`.
        entropy: [tokens] the entropies of their predictions in nats; not read if the objective needs none.
    """
    nll = torch.from_numpy(ell).double()
    given = torch.from_numpy(entropy).double() if spec.objective.needs_entropy else None
    terms = []
    for name, coefficient, objective in _terms(spec.objective):
        value = TokenLoss(objective)(nll, entropy=given).item()
        weights = token_weights(objective, nll, entropy=given).numpy()
        terms.append(Term(name, coefficient, value, weights))
    return Weights(spec, terms)


def _terms(objective: Objective) -> Iterator[tuple[str | None, float, Objective]]:
    """For each term its coefficient's name and value, and an objective that is this term alone."""
    if not isinstance(objective, NVAMP):
        yield None, 1.0, objective
        return
    for name in COEFFICIENTS:  # value and weights are linear in them
        alone = {other: float(other == name) for other in COEFFICIENTS}
        yield name, getattr(objective, name), replace(objective, **alone)  # type: ignore[arg-type]
