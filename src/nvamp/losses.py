"""The losses as modules."""

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from nvamp.functional import NVAMPStats, Settings, linear_nvamp_loss, nvamp_loss, token_nvamp_loss
from nvamp.objective import Gradient

if TYPE_CHECKING:
    from nvamp.distributed import Group


class _NVAMP(nn.Module):
    def __init__(
        self,
        alpha: float = 1.0,
        beta: float = 0.02,
        gamma: float = 0.001,
        eps: float = 1e-6,
        ignore_index: int = -100,
        *,
        gradient: Gradient = "scalar",
        shift: bool = True,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        inplace_backward: bool = False,
        accum_dtype: torch.dtype | None = None,
        process_group: "Group | None" = None,
        vocab_group: "Group | None" = None,
        reduce_grad_hidden: bool = True,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.alpha = alpha
        self.beta = beta
        self.gamma = gamma
        self.eps = eps
        self.ignore_index = ignore_index
        self.gradient = gradient
        self.shift = shift
        self.label_smoothing = label_smoothing
        self.z_loss = z_loss
        self.softcap = softcap
        self.logit_scale = logit_scale
        self.inplace_backward = inplace_backward
        self.accum_dtype = accum_dtype
        self.process_group = process_group
        self.vocab_group = vocab_group
        self.reduce_grad_hidden = reduce_grad_hidden
        self.backend = backend
        self.on_stats: Callable[[NVAMPStats], None] | None = None
        Settings(**self._options()).check()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A copy with the same groups, which are the processes' and cannot be copied, and who is told."""
        memo |= {id(shared): shared for shared in (self.process_group, self.vocab_group, self.on_stats)}
        new = self.__class__.__new__(self.__class__)
        memo[id(self)] = new
        new.__dict__ = copy.deepcopy(self.__dict__, memo)
        return new

    def _options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in Settings._fields}

    def extra_repr(self) -> str:
        defaults = Settings._field_defaults
        always = ("alpha", "beta", "gamma", "gradient")
        shown = {k: v for k, v in self._options().items() if k in always or v != defaults[k]}
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())


class NVAMPLoss(_NVAMP):
    """NVAMP loss of logits: cross-entropy, weighted by how widely the losses spread, and a maximum penalty.

    With ℓ the losses of the N valid tokens, M = `num_items_in_batch` or N, and μ, σ² their mean and variance:

        L = alpha·d·C + beta·C + gamma·X·(N/M)
        C = Σℓ/M,   X = max ℓ,   d = mean |ℓ − μ| / sqrt(σ² + eps)

    Args:
        alpha: weight of the variance-normalized term.
        beta: weight of the cross-entropy.
        gamma: weight of the largest loss.
        eps: added to the variance, in nats².
        ignore_index: the label of tokens that do not count.
        gradient: what `backward` takes the gradient of; the value is always L.
            `"scalar"` holds d constant, so that cross-entropy and maximum train, each with its weight.
            `"token"` gives a token the weight (alpha·|z| + beta)/M, z its own normalized deviation.
            `"detached"` is the loss as first published: the gradient of alpha·d·C alone, d constant.
            `"full"` is the exact derivative of L. It does not train a model from scratch: making all tokens
            equally bad lowers d, and that is easier than learning.
        shift: score position t against label t+1, as causal language models need; `False` for labels that are
            shifted already.
        label_smoothing, z_loss, softcap, logit_scale: see `nvamp.engine.options.TokenOptions`.
        inplace_backward: let the backward overwrite the logits; see `nvamp.functional.token_nll`. A linear
            loss, which never has them all, always does.
        accum_dtype: of a linear loss, in which its weight's gradient is added up; see
            `nvamp.functional.linear_token_nll`.
        process_group: the ranks that hold the batch together, a `ProcessGroup` or a `DeviceMesh` of one
            dimension. Every rank gets the loss of the whole batch, and a gradient whose mean over the ranks,
            which is what DDP and FSDP make, is that of the whole batch; see docs/distributed.md.
        vocab_group: the ranks that have the vocabulary together, tensor parallel, each a part of it; see
            `nvamp.functional.token_nll`. A linear loss then makes its logits again in the backward.
        reduce_grad_hidden: of a linear loss with `vocab_group`; see `nvamp.functional.linear_token_nll`.
        backend: the engine's; `None` for the best one of the device.

    Attributes:
        on_stats: called with the `NVAMPStats` of every loss, where it is set. So those can be had of a loss
            that a trainer or a model computes; `nvamp.integrations.stats.log_stats` does.

    Raises:
        ValueError: an option out of range.

    References:
        Mariusz Kurman, NVAMP Loss, 2025: https://github.com/mkurman/nvamp-loss
    """

    def forward(
        self,
        logits: Tensor,
        labels: Tensor,
        num_items_in_batch: Tensor | float | None = None,
        *,
        return_stats: bool = False,
    ) -> Any:
        """The loss, a scalar in float32 (float64 for float64 logits), in nats.

        Args:
            logits: [batch, seq, vocab], or any [..., seq, vocab], of any floating dtype and strides.
            labels: [batch, seq] int64 or int32; each in [0, vocab) or `ignore_index`.
            num_items_in_batch: the tokens of the whole optimizer step, over which the losses of its
                micro-batches are to add up. By default those of this call.
            return_stats: return `(loss, NVAMPStats)`.

        Raises:
            TypeError, ValueError: arguments that do not fit; see `nvamp.functional.token_nll`.
        """
        return nvamp_loss(  # type: ignore[call-overload]  # which overload, the caller knows
            logits,
            labels,
            num_items_in_batch=num_items_in_batch,
            return_stats=return_stats,
            **self._options(),
        )


class LinearNVAMPLoss(_NVAMP):
    """`NVAMPLoss` of `hidden @ weight.T + bias`, without ever holding all logits.

    The options are those of `NVAMPLoss`. With `gradient` `"scalar"` or `"detached"` the gradients are made in
    the forward, in three matrix products. Otherwise, and in float16, where the gradient of a sum could
    overflow, the backward makes the logits again, which takes four.
    """

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        bias: Tensor | None = None,
        *,
        num_items_in_batch: Tensor | float | None = None,
        return_stats: bool = False,
    ) -> Any:
        """The loss, a scalar; arguments and errors not named here are those of `NVAMPLoss`.

        Args:
            hidden: [batch, seq, features], the last hidden states.
            weight: [vocab, features], that of the output layer.
            labels: [batch, seq].
            bias: [vocab] or None.
        """
        return linear_nvamp_loss(  # type: ignore[call-overload]  # which overload, the caller knows
            hidden,
            weight,
            labels,
            bias,
            num_items_in_batch=num_items_in_batch,
            return_stats=return_stats,
            **self._options(),
        )


class TokenNVAMPLoss(_NVAMP):
    """`NVAMPLoss` of per-token losses that something else has computed, such as a trainer's own fused head.

    Of the options of `NVAMPLoss` it takes those of the objective; the others are for whoever computes losses.
    """

    def __init__(
        self,
        alpha: float = 1.0,
        beta: float = 0.02,
        gamma: float = 0.001,
        eps: float = 1e-6,
        *,
        gradient: Gradient = "scalar",
        process_group: "Group | None" = None,
    ) -> None:
        super().__init__(alpha, beta, gamma, eps, gradient=gradient, process_group=process_group)

    def forward(
        self,
        nll: Tensor,
        valid: Tensor | None = None,
        num_items_in_batch: Tensor | float | None = None,
        *,
        return_stats: bool = False,
    ) -> Any:
        """The loss, a scalar in float32 (float64 for float64 losses), in nats.

        Args:
            nll: [...] losses of the tokens in nats, with their gradient.
            valid: [...] bool, which of them count; all by default. The others may hold anything.
            num_items_in_batch, return_stats: as in `NVAMPLoss`.

        Raises:
            TypeError, ValueError: arguments that do not fit.
        """
        return token_nvamp_loss(
            nll,
            valid,
            num_items_in_batch=num_items_in_batch,
            return_stats=return_stats,
            alpha=self.alpha,
            beta=self.beta,
            gamma=self.gamma,
            eps=self.eps,
            gradient=self.gradient,
            process_group=self.process_group,
            on_stats=self.on_stats,
        )
