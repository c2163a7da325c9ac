"""What a trained model does on held-out text: losses and calibration, at every temperature."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nvamp.study.metrics import cvar
from nvamp.study.store import Json

TEMPERATURES = (0.8, 0.85, 0.9, 0.95, 1.0, 1.05, 1.1, 1.15, 1.2, 1.3, 1.4, 1.5)
MIXES = (0.02, 0.05, 0.1)  # shares of the uniform distribution that are mixed into the model's
EXTREME = 0.001  # the share of the tokens, the worst ones, that "extreme" averages
BINS = 15  # of the expected calibration error, equally wide


@dataclass(frozen=True)
class Predictions:
    """A model's predictions of tokens at one temperature, each [tokens].

    Attributes:
        nll: −log p of the label, in nats.
        confidence: p of the likeliest token.
        correct: whether that token is the label.
        squares: Σ p² over the vocabulary.
    """

    nll: NDArray[np.float64]
    confidence: NDArray[np.float64]
    correct: NDArray[np.bool_]
    squares: NDArray[np.float64]

    def of(self, tokens: NDArray[np.bool_]) -> "Predictions":
        return Predictions(
            self.nll[tokens], self.confidence[tokens], self.correct[tokens], self.squares[tokens]
        )

    def metrics(self) -> dict[str, float]:
        """Losses in nats, accuracy in percent, and two measures of calibration.

        "ece" is the expected calibration error of Guo et al. (1706.04599), in percent; "brier" the mean of
        Σ_v (p_v − [v is the label])².
        """
        worst = max(1, round(EXTREME * self.nll.size))
        return {
            "mean": float(self.nll.mean()),
            "cvar": cvar(self.nll),
            "extreme": float(np.sort(self.nll)[-worst:].mean()),
            "max": float(self.nll.max()),
            "accuracy": 100 * float(self.correct.mean()),
            "ece": 100 * calibration_error(self.confidence, self.correct),
            "brier": float((self.squares - 2 * np.exp(-self.nll) + 1).mean()),
        }


def calibration_error(confidence: NDArray[np.float64], correct: NDArray[np.bool_]) -> float:
    """The mean distance between confidence and accuracy over `BINS` bins, weighted by their tokens."""
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    gaps = np.bincount(bins, weights=confidence - correct, minlength=BINS)
    return float(np.abs(gaps).sum() / confidence.size)


@torch.no_grad()
def predictions(model: Any, blocks: Tensor) -> list[Predictions]:
    """The predictions of all tokens of `blocks` [blocks, sequence] but the first of each, by temperature."""
    model.eval()
    device = next(model.parameters()).device
    found = [list(_predict(model, part.to(device))) for part in torch.split(blocks, 16)]
    return [
        Predictions(*(np.concatenate([one[index][name] for one in found]) for name in range(4)))
        for index in range(len(TEMPERATURES))
    ]


def _predict(model: Any, blocks: Tensor) -> Iterator[tuple[NDArray[Any], ...]]:
    logits, labels = model(input_ids=blocks).logits[:, :-1].float(), blocks[:, 1:, None]
    largest, best = logits.max(-1)
    correct = (best == labels[..., 0]).flatten().cpu().numpy()
    for temperature in TEMPERATURES:
        scaled = logits / temperature
        lse = scaled.logsumexp(-1)
        nll = lse - scaled.gather(-1, labels)[..., 0]
        confidence = (largest / temperature - lse).exp()
        squares = ((2 * scaled).logsumexp(-1) - 2 * lse).exp()
        yield (_flat(nll), _flat(confidence), correct, _flat(squares))


def _flat(values: Tensor) -> NDArray[np.float64]:
    return values.double().flatten().cpu().numpy()


def mixed(nll: NDArray[np.float64], share: float, vocabulary: int) -> NDArray[np.float64]:
    """The losses of a model that is mixed with a share of the uniform distribution."""
    result: NDArray[np.float64] = -np.log((1 - share) * np.exp(-nll) + share / vocabulary)
    return result


def measure(found: list[Predictions], documents: NDArray[np.int64], vocabulary: int) -> Json:
    """The metrics at every temperature and of every mixture, on both halves of the held-out documents.

    A setting may be chosen on half "0", the even documents, and is then judged on half "1".
    """
    halves = {str(half): documents % 2 == half for half in (0, 1)}
    plain = found[TEMPERATURES.index(1.0)]
    return {
        half: {
            "temperatures": [one.of(tokens).metrics() for one in found],
            "mixes": [
                {"mean": float(nll.mean()), "cvar": cvar(nll), "max": float(nll.max())}
                for nll in (mixed(plain.nll[tokens], share, vocabulary) for share in MIXES)
            ],
        }
        for half, tokens in halves.items()
    }
