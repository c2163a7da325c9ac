"""What a backend does to the rows of logits; the rest of the engine is the same for all."""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from nvamp.engine.options import Head, Options, accumulate_dtype


class Largest(NamedTuple):
    """The row of the largest loss so far, the first of equals, found without waiting for the device.

    Entry i of `loss` and `row` covers chunks 0 to i − 1, so that a kernel overwrites nothing it reads.
    """

    loss: Tensor  # [chunks + 1], −inf before there is one
    row: Tensor  # int64 [chunks + 1]
    grad: Tensor  # [V], with respect to its logits
    hidden: Tensor  # [D]

    @classmethod
    def none(cls, head: Head, chunks: int) -> "Largest":
        return cls(
            head.hidden.new_full((chunks + 1,), -torch.inf, dtype=accumulate_dtype(head.hidden.dtype)),
            head.labels.new_zeros(chunks + 1, dtype=torch.int64),
            head.weight.new_zeros(len(head.weight)),
            head.hidden.new_zeros(head.hidden.shape[1]),
        )


class Chunk(NamedTuple):
    """Some rows of the linear path, once their logits have become gradients."""

    number: int  # how many chunks came before it
    start: int  # its first row
    nll: Tensor  # [rows]
    labels: Tensor  # [rows]
    grad: Tensor  # [rows, V], with respect to their logits
    hidden: Tensor  # [rows, D]


class OfEntropy(NamedTuple):
    """The entropies of rows, as `Backend.token_nll` returned them, and the gradients with respect to them."""

    entropy: Tensor  # [...]
    grad: Tensor  # [...]


class Backend(Protocol):
    """Losses, `norm` and the gradients with respect to losses are float32, or float64 for float64 logits.

    `norm` [..., 2] has the largest z of each row and log Σ exp(z − largest). Their sum is the log-sum-exp;
    they stay apart because the rounding of a large sum would be the error of a softmax made from it.

    `triton` is not given a `class_weight` together with label smoothing.

    Labels are int32 or int64. A label out of range gives NaN, unless the logits are a part of the vocabulary:
    then the label belongs to another part. Rows with `ignore_index` may hold anything; their losses,
    entropies, predictions and gradients are 0.
    """

    def token_nll(self, logits: Tensor, labels: Tensor, metrics: int, opt: Options) -> tuple[Tensor, ...]:
        """(nll, norm), and as many metrics as are wanted, from logits [..., V] of any strides.

        `metrics` says how many: 0; 2, the entropy and the prediction; or 3, the mean of z as well. The
        prediction is the class of the largest z, the first of equals, in int64; in a row with NaN it may be
        any class.
        """

    def part_statistics(
        self, logits: Tensor, labels: Tensor, metrics: int, opt: Options
    ) -> tuple[Tensor, ...]:
        """(norm, z of the label or 0 if it is in another part, Σ (largest − z)) for a part of the vocabulary.

        `norm` here is the largest z and Σ exp(z − largest), without the logarithm, so that it adds up over
        parts. The last sum is 0 without label smoothing, and Σ (0 − z) if the largest z is −inf; each class
        counts in it as much as its `class_weight`. `metrics` adds the entropy and the prediction, as if the
        part were the whole; if Σ exp is 0, the entropy may be anything. In place of the mean there is
        Σ (largest − z), in which all classes count alike.
        """

    def token_nll_backward(
        self,
        grad_nll: Tensor,
        logits: Tensor,
        labels: Tensor,
        norm: Tensor,
        opt: Options,
        out: Tensor,
        classes: Tensor | None = None,
        of_entropy: OfEntropy | None = None,
        weights: Tensor | None = None,
    ) -> None:
        """Writes the gradient of Σ grad_nll·nll with respect to logits [..., V] to `out`.

        `out` is contiguous, or the logits themselves. With `of_entropy` it gets the gradient of
        Σ grad_nll·nll + Σ grad·entropy. With `classes` the logits are a part of a vocabulary of that size;
        `norm` and the entropies describe the whole vocabulary, and so do `weights`, which are those of
        `weights_of` if there is a `class_weight`.
        """

    def unit_gradient_(self, logits: Tensor, labels: Tensor, opt: Options) -> Tensor:
        """Returns nll and turns logits [rows, V] into the gradient of Σ nll; what pads rows may change."""

    def keep_largest(self, largest: Largest, chunk: Chunk, opt: Options) -> None:
        """Takes the next chunk into account."""

    def scale_and_add(
        self, x: Tensor, a: Tensor, b: Tensor | None, u: Tensor, v: Tensor, out: Tensor
    ) -> None:
        """Writes a·x + b·u vᵀ to `out`, for contiguous x [R, C], u [R], v [C]; `out` may be x."""
