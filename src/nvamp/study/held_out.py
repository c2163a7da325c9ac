"""Held-out text under a model: what it makes of every token, without its logits if the model is patched."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad
from transformers import default_data_collator

from nvamp.engine import TokenMetrics
from nvamp.functional import token_nll
from nvamp.integrations.modes import in_mode
from nvamp.integrations.transformers import logits_of
from nvamp.integrations.transformers.patching import installed_loss, linear_token_nll_of
from nvamp.study.packing import IGNORED

BATCH_TOKENS = 1024  # in a batch of examples, which has at least one

# `input_ids` and `labels`, and `position_ids` if the model is to have them; each [sequence] int64.
Example = Mapping[str, Tensor]
# From labels [B, S] to their losses and what the pass finds out.
Losses = Callable[[Tensor], tuple[Tensor, TokenMetrics]]


class Examples(Protocol):
    """Examples of one length, by their index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


class TokenScores(NamedTuple):
    """What a model makes of the labels of examples, one after the other. The first of an example has none.

    Attributes:
        nll: [tokens] float32, their plain losses in nats.
        correct: [tokens] bool, whether the likeliest token is the label.
        prediction: [tokens] int64, the likeliest token.
        confidence: [tokens] float32, the probability of the likeliest token.
        entropy: [tokens] float32, of the prediction, in nats.
        labels: [tokens] int64.
    """

    nll: NDArray[np.float32]
    correct: NDArray[np.bool_]
    prediction: NDArray[np.int64]
    confidence: NDArray[np.float32]
    entropy: NDArray[np.float32]
    labels: NDArray[np.int64]


@torch.no_grad()
def score(model: Any, examples: Examples, bf16: bool = False) -> TokenScores:
    """Score the labels of `examples` that are not −100 on the device of `model`, in evaluation mode.

    Args:
        bf16: compute matrix products in bfloat16, by autocast.
    """
    device = next(model.parameters()).device
    parts = []
    with in_mode(model, False), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        for batch in _batches(examples):
            labels = pad(batch.pop("labels")[:, 1:], (0, 1), value=IGNORED).to(device)
            losses = _losses(model, {name: x.to(device) for name, x in batch.items()})
            nll, metrics = losses(labels)
            confidence = (-losses(metrics.prediction)[0].float()).exp()
            fields = (
                nll.float(),
                metrics.correct,
                metrics.prediction,
                confidence,
                metrics.entropy.float(),
                labels,
            )
            parts.append([field[labels != IGNORED].cpu() for field in fields])
    return TokenScores(*(torch.cat(part).numpy() for part in zip(*parts, strict=True)))


def _batches(examples: Examples) -> Iterator[dict[str, Tensor]]:
    size = max(1, BATCH_TOKENS // len(examples[0]["labels"]))
    for begin in range(0, len(examples), size):  # a DataLoader would draw from the training's random numbers
        yield default_data_collator([examples[i] for i in range(begin, min(begin + size, len(examples)))])


def _losses(model: Any, inputs: Mapping[str, Tensor]) -> Losses:
    """The losses of labels [B, S], each of the position that it is at, and what their pass finds out."""
    if installed_loss(model) is not None:
        found: Losses = linear_token_nll_of(model, use_cache=False, **inputs)
        return found
    logits = logits_of(model(use_cache=False, **inputs))
    return lambda labels: token_nll(logits, labels, return_metrics=True)
