"""What a backend does to the rows of logits; the rest of the engine is the same for all."""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from nvamp.engine.options import Head, Options, accumulate_dtype


class Largest(NamedTuple):
    """The row of the largest loss so far, the first of equals: found without a look at the data.

    Entry i of `loss` and `row` is that of chunks 0 to i − 1, so that a kernel overwrites nothing it reads.
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

    number: int  # of chunks before it
    start: int  # its first row
    nll: Tensor  # [rows]
    labels: Tensor  # [rows]
    grad: Tensor  # [rows, V], with respect to their logits
    hidden: Tensor  # [rows, D]


class OfEntropy(NamedTuple):
    """Entropies of rows as `Backend.token_nll` gave them, and the gradients with respect to them."""

    entropy: Tensor  # [...]
    grad: Tensor  # [...]


class Backend(Protocol):
    """Losses, `norm` and the gradients by losses are float32, float64 for float64.

    `norm` [..., 2] is of each row the largest z, and log Σ exp(z − largest). Their sum is the log-sum-exp,
    but of large logits its rounding would be the error of a softmax made from it.

    Labels are int32 or int64. One out of range gives NaN, unless the logits are those of a part of the
    vocabulary: there it is a label of another part. Rows with `ignore_index` may hold anything; their losses,
    entropies, predictions and gradients are 0.
    """

    def token_nll(self, logits: Tensor, labels: Tensor, metrics: bool, opt: Options) -> tuple[Tensor, ...]:
        """(nll, norm), with `metrics` (nll, norm, entropy, prediction), of logits [..., V] of any strides.

        The prediction is the class of the largest z, the first of equals, in int64; in a row that has NaN it
        is any class.
        """

    def part_statistics(
        self, logits: Tensor, labels: Tensor, metrics: bool, opt: Options
    ) -> tuple[Tensor, ...]:
        """(norm, z of the label or 0 if it is in another part, Σ (largest − z)) of a part of the vocabulary.

        `norm` is here the largest z and Σ exp(z − largest), without the logarithm, which adds up over parts.
        The last sum is 0 unless there is label smoothing; if the largest z is −inf, it is subtracted from 0.
        With `metrics` there are two more, entropy and prediction as if the part were all: if its Σ exp is 0,
        the entropy may be anything.
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
    ) -> None:
        """Writes the gradient of Σ grad_nll·nll by logits [..., V] to `out`: contiguous, or the logits.

        With `of_entropy` it is the gradient of Σ grad_nll·nll + Σ grad·entropy. With `classes` the logits are
        those of a part of a vocabulary of that size; `norm` and the entropies are of all of it.
        """

    def unit_gradient_(self, logits: Tensor, labels: Tensor, opt: Options) -> Tensor:
        """nll of logits [rows, V], which become the gradient of Σ nll; what lies between rows may change."""

    def keep_largest(self, largest: Largest, chunk: Chunk, opt: Options) -> None:
        """Takes the next chunk into account."""

    def scale_and_add(
        self, x: Tensor, a: Tensor, b: Tensor | None, u: Tensor, v: Tensor, out: Tensor
    ) -> None:
        """Writes a·x + b·u vᵀ to `out`, for contiguous x [R, C], u [R], v [C]; `out` may be x."""
