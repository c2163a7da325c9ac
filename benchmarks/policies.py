"""Losses and differentiable entropies of tokens from hidden states, as reinforcement learning takes them."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from nvamp.functional import linear_token_nll

Outputs = Callable[[], tuple[Tensor, ...]]  # the losses, and the entropies if asked for


def ours(h: Tensor, w: Tensor, y: Tensor) -> Outputs:
    def outputs() -> tuple[Tensor, Tensor]:
        nll, metrics = linear_token_nll(h, w, y, return_metrics=True)
        return nll, metrics.entropy

    return outputs


def eager(h: Tensor, w: Tensor, y: Tensor) -> Outputs:
    def outputs() -> tuple[Tensor, Tensor]:
        logprob = (h @ w.T).float().log_softmax(-1)
        return -logprob.gather(-1, y[:, None])[:, 0], -(logprob.exp() * logprob).sum(-1)

    return outputs


def compiled(h: Tensor, w: Tensor, y: Tensor) -> Outputs:
    outputs: Outputs = torch.compile(eager(h, w, y))
    return outputs


def trl(h: Tensor, w: Tensor, y: Tensor) -> Outputs:
    apply = _of("trl.kernels", "ChunkedLogProbFunction").apply
    columns = _of("trl.trainer.utils", "_CHUNKED_LOGPROB_CHUNK_SIZE")
    return lambda: apply(h, w, None, y, 1.0, columns, None, 1.0, ("entropy",))[:2]


def verl(h: Tensor, w: Tensor, y: Tensor) -> Outputs:
    """The formulas of verl, which Liger takes where it has no kernel of its own."""
    module = "liger_kernel.ops.fused_linear_scaled_cross_entropy"
    apply = _of(module, "_FusedLinearPPOFallbackFunction").apply
    return lambda: apply(h, w, y, 1.0, -100, True)


def _of(module: str, name: str) -> Any:
    """A class or number of a peer; an `ImportError` if it is not installed."""
    return getattr(import_module(module), name)


# Each raises an `ImportError` if it is not installed.
PEERS: dict[str, Callable[[Tensor, Tensor, Tensor], Outputs]] = {
    "TRL, chunked": trl,
    "Liger's fallback, from verl": verl,
}
