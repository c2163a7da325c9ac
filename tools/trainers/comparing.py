"""The comparison that every trainer passes: its own cross-entropy, ours, and NVAMP, which must differ."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

LIMIT = 1e-5  # of a relative difference, in float32
DIFFERENT = 1e-2


class Outcome(NamedTuple):
    """What a trainer made of the model."""

    losses: Tensor  # as the trainer logs them, nats, [steps]
    moved: Tensor | None = None  # by how much training changed the weights, [parameters]


class Result(NamedTuple):
    """How far two trainings agree: ‖ours − its‖ / ‖its‖, for what the trainer's own loss gave."""

    what: str
    losses: float
    weights: float | None
    nvamp: float  # the losses under NVAMP against the trainer's own
    limit: float = LIMIT

    @property
    def agrees(self) -> bool:
        close = all(x <= self.limit for x in (self.losses, self.weights) if x is not None)
        return close and self.nvamp > DIFFERENT


def compare(what: str, train: Callable[[str | None], Outcome], limit: float = LIMIT) -> Result:
    """Trains three times.

    Args:
        what: is compared, for the reader.
        train: trains the same model on the same data with an objective given as a text, or with the trainer's
            own cross-entropy if it is None.
        limit: of the differences; above LIMIT where the trainer's own is known to be another loss.
    """
    own, ours, nvamp = (train(objective) for objective in (None, "ce", "nvamp"))
    weights = None if own.moved is None or ours.moved is None else difference(ours.moved, own.moved)
    losses, changed = difference(ours.losses, own.losses), difference(nvamp.losses, own.losses)
    return Result(what, losses, weights, changed, limit)


def difference(a: Tensor, b: Tensor) -> float:
    """‖a − b‖ / ‖b‖ in float64."""
    a, b = a.double(), b.double()
    return float((a - b).norm() / b.norm())
