"""An objective: a rule that turns the losses of a batch's tokens into one number and a weight per token.

It sees the losses without their gradient and returns its value L and the weights ∂L/∂ℓ; the engine does the
rest. So an objective is arithmetic on N numbers and never sees logits. All shapes are static and all results
are tensors, so nothing here waits for a device. The batch may lie on several ranks, which exchange sums.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

from nvamp.ranks import ALONE, Ranks


class Batch(NamedTuple):
    """What an objective sees: the tokens of a batch that are on this rank, without gradient."""

    nll: Tensor  # [tokens] float32 or float64, nats; 0 if not valid
    valid: Tensor  # [tokens] bool
    num_items_in_batch: Tensor | float | None = None  # M; by default N, the number of valid tokens
    ranks: Ranks = ALONE
    inputs: Mapping[str, Tensor] = {}  # [tokens] each, in the dtype of nll; 0 if not valid
    entropy: Tensor | None = None  # [tokens] nats, 0 if not valid; for an objective that `needs_entropy`

    def sums(self, *x: Tensor) -> tuple[Tensor, ...]:
        """N, and the sum of each x [tokens] over the valid tokens of all ranks: one all-reduce."""
        n = self.valid.sum(dtype=self.nll.dtype)
        own = [n, *(torch.where(self.valid, each, 0).sum() for each in x)]
        return tuple(own if self.ranks is ALONE else self.ranks.total(torch.stack(own)).unbind())

    def items(self, n: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """M and N/M, if the batch has N = n valid tokens; an M of 0 counts as 1."""
        m = self.num_items_in_batch
        if m is None:
            return n.clamp(min=1), 1.0
        # A tensor stays on its device: moving it would wait.
        m = torch.where(m == 0, 1, m.to(n.dtype)) if isinstance(m, Tensor) else m or 1
        return m, n / m

    def mean(self, values: Tensor, weights: Tensor, entropy_weights: Tensor | None = None) -> "Result":
        """The result L = Σ values / M, if ∂L/∂ℓ is `weights` / M; [tokens] each."""
        n, total = self.sums(values)
        m, _ = self.items(n)
        if entropy_weights is not None:
            entropy_weights = entropy_weights / m
        return Result(total / m, per_token=weights / m, entropy_weights=entropy_weights)


class Statistics(NamedTuple):
    """Statistics of the losses of a batch: scalar tensors, losses in nats."""

    num_tokens: Tensor  # N, in the dtype of the losses
    num_items: Tensor | float  # M
    share: Tensor | float  # N/M, 1 if M is N
    cross_entropy: Tensor  # C
    mean: Tensor  # μ
    std: Tensor  # σ, with ε
    dispersion: Tensor  # d
    mean_sign: Tensor  # mean sign(ℓ − μ)
    max: Tensor  # the largest loss; 0 if no token is valid
    max_index: Tensor  # int64, first of equals; −1 if no token is valid, or another rank has the largest
    scale: Tensor | float  # a power of two, 1 unless losses are so large that their squares would overflow


class Result(NamedTuple):
    """Value and weights: ∂L/∂ℓ_i is `shared` + `per_token`_i for every valid token i.

    An objective with `few_weights` keeps the two apart, `shared` for all tokens and `per_token` for a few.
    Its gradient with respect to hidden states and weight then takes one pass.
    """

    loss: Tensor  # L, a scalar
    shared: Tensor | None = None  # a scalar; None for 0
    per_token: Tensor | None = None  # [tokens]; None for 0
    entropy_weights: Tensor | None = None  # [tokens] ∂L/∂H, H the entropy of the prediction; None for 0
    statistics: Callable[[], Statistics] | None = None  # if the objective has computed them

    def weights(self) -> Tensor:
        """∂L/∂ℓ, [tokens] or a scalar; it may be anything for tokens that are not valid."""
        if self.per_token is None:
            assert self.shared is not None
            return self.shared
        return self.per_token if self.shared is None else self.per_token + self.shared


@dataclass(frozen=True)
class Objective:
    """The base class of objectives: derive a frozen dataclass with the options as fields; define `evaluate`.

    The properties may be overridden too, even by class attributes: `inputs = ("advantage",)`.
    """

    def __post_init__(self) -> None:
        for field in fields(self):
            if (check := field.metadata.get("check")) is not None:
                given = getattr(self, field.name)
                if (kept := check(field.name, given)) is not given:
                    object.__setattr__(self, field.name, kept)

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the per-token inputs that `evaluate` needs, such as "token_weight"."""
        return ()

    @property
    def optional_inputs(self) -> tuple[str, ...]:
        """Names of the per-token inputs that `evaluate` uses if they are given."""
        return ()

    @property
    def needs_entropy(self) -> bool:
        """Whether `evaluate` needs `Batch.entropy`."""
        return False

    def few_weights(self, tokens: int) -> int | None:
        """How many of `tokens` tokens have their own weight beside the one that all share.

        `None`, the default, means any number. Otherwise these are the tokens with the largest losses, and
        `Result.shared` is the weight of all tokens.
        """
        return None

    def evaluate(self, batch: Batch) -> Result:
        """L and its weights. Its collectives, if any, must not depend on the data."""
        raise NotImplementedError

    def __str__(self) -> str:
        """The text from which `parse` makes this objective: `focal:gamma=2`."""
        from nvamp.objectives.spec import spell

        return spell(self)
