"""The losses as functions, and the primitives to build others from."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar, overload

import torch
from torch import Tensor
from torch.nn.functional import pad
from typing_extensions import Unpack

from nvamp import fused, objective
from nvamp.engine import (
    TokenMetrics,
    can_one_pass,
    linear_nll_sum_max,
    linear_token_nll,
    token_nll,
)
from nvamp.engine.backends import check_backend
from nvamp.engine.checks import (
    check_floating,
    check_labels,
    check_linear,
    check_logits,
    has_transforms,
)
from nvamp.engine.options import Options, TokenOptions, accumulate_dtype, checked
from nvamp.engine.parts import has_dtensors
from nvamp.objective import GRADIENTS, Gradient, Result
from nvamp.ranks import ALONE, Ranks

if TYPE_CHECKING:
    from nvamp.distributed import Group

T = TypeVar("T")
Items = Tensor | float | None  # num_items_in_batch
TINY = torch.finfo(torch.float32).tiny  # what is smaller may come to 0

__all__ = [
    "NVAMPOptions",
    "NVAMPStats",
    "TokenMetrics",
    "linear_nvamp_loss",
    "linear_token_nll",
    "nvamp_loss",
    "token_nll",
    "token_nvamp_loss",
    "token_weights",
]


class NVAMPOptions(TokenOptions, total=False):
    """Keyword arguments of the losses; `NVAMPLoss` describes them."""

    alpha: float
    beta: float
    gamma: float
    eps: float
    ignore_index: int
    gradient: Gradient
    shift: bool
    inplace_backward: bool
    accum_dtype: torch.dtype | None
    process_group: "Group | None"
    vocab_group: "Group | None"
    reduce_grad_hidden: bool
    backend: str | None
    on_stats: "Callable[[NVAMPStats], None] | None"


class NVAMPStats(NamedTuple):
    """What a loss was made of. Scalar tensors without gradient, on the device of the loss; losses in nats.

    With a `process_group`, of all its ranks; but the last three and the index are of the tokens of this one.
    """

    cross_entropy: Tensor  # Σ ℓ / num_items_in_batch
    mean: Tensor  # of the losses of the valid tokens
    std: Tensor  # sqrt(their variance + eps)
    dispersion: Tensor  # mean |ℓ − mean| / std
    max: Tensor  # the largest loss; 0 where no token is valid
    max_index: Tensor  # int64: its row of the flattened logits; −1 where none is valid or another rank has it
    num_tokens: Tensor  # int64: valid tokens
    min_weight: Tensor  # the smallest ∂L/∂ℓ of a valid token
    max_weight: Tensor  # the largest
    hardest_share: (
        Tensor  # of Σ |∂L/∂ℓ|, the part of the 1% of the tokens, rounded up, with the largest losses
    )


class Settings(NamedTuple):
    """`NVAMPOptions` with their defaults."""

    alpha: float = 1.0
    beta: float = 0.02
    gamma: float = 0.001
    eps: float = 1e-6
    ignore_index: int = -100
    gradient: Gradient = "scalar"
    shift: bool = True
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float | None = None
    logit_scale: float = 1.0
    inplace_backward: bool = False
    accum_dtype: torch.dtype | None = None
    process_group: Any = None
    vocab_group: Any = None
    reduce_grad_hidden: bool = True
    backend: str | None = None
    on_stats: Callable[[NVAMPStats], None] | None = None

    def check(self) -> "Settings":
        """These settings, or a `ValueError` that names what is wrong with them."""
        for name, number in self.coefficients.items():
            if not abs(number) < math.inf:
                raise ValueError(f"{name} must be finite, got {number}")
        if self.gradient not in GRADIENTS:
            raise ValueError(f"gradient must be one of {', '.join(GRADIENTS)}, got {self.gradient!r}")
        if not TINY <= self.eps < math.inf:
            raise ValueError(f"eps must be finite and at least {TINY:.2g}, got {self.eps}")
        if self.accum_dtype is not None and not isinstance(self.accum_dtype, torch.dtype):
            raise TypeError(f"accum_dtype must be a torch.dtype or None, got {self.accum_dtype!r}")
        check_backend(self.backend)
        for name in ("process_group", "vocab_group"):
            if (group := getattr(self, name)) is not None:
                from nvamp.distributed import check_group  # only here: PyTorch can be built without it

                check_group(name, group)
        checked(Options(self.ignore_index, self.label_smoothing, self.z_loss, self.softcap, self.logit_scale))
        return self

    @property
    def ranks(self) -> Ranks:
        if self.process_group is None:
            return ALONE
        from nvamp.distributed import ranks_of

        return ranks_of(self.process_group)

    @property
    def coefficients(self) -> dict[str, Any]:
        return {"alpha": self.alpha, "beta": self.beta, "gamma": self.gamma}

    @property
    def engine(self) -> dict[str, Any]:
        return {
            "ignore_index": self.ignore_index,
            "label_smoothing": self.label_smoothing,
            "z_loss": self.z_loss,
            "softcap": self.softcap,
            "logit_scale": self.logit_scale,
            "backend": self.backend,
        }

    def targets(self, labels: Tensor) -> Tensor:
        """The label of each row: with `shift` that of the row after it, and none for the last."""
        if not self.shift:
            return labels
        return pad(labels[..., 1:], (0, 1), value=self.ignore_index)[..., : labels.shape[-1]]


@overload
def nvamp_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    num_items_in_batch: Tensor | float | None = ...,
    return_stats: Literal[False] = ...,
    **options: Unpack[NVAMPOptions],
) -> Tensor: ...
@overload
def nvamp_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    num_items_in_batch: Tensor | float | None = ...,
    return_stats: Literal[True],
    **options: Unpack[NVAMPOptions],
) -> tuple[Tensor, NVAMPStats]: ...
def nvamp_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    num_items_in_batch: Tensor | float | None = None,
    return_stats: bool = False,
    **options: Unpack[NVAMPOptions],
) -> Tensor | tuple[Tensor, NVAMPStats]:
    """`nvamp.NVAMPLoss` as a function: its options are keyword arguments here."""
    c = Settings(**options).check()
    if has_dtensors(logits, labels):
        from nvamp.dtensors import local_logits

        logits, labels, vocab_group = local_logits(logits, labels, c.vocab_group)
        c = c._replace(vocab_group=vocab_group)
    engine = {"inplace_backward": c.inplace_backward, "vocab_group": c.vocab_group, **c.engine}
    ranks = c.ranks

    def losses() -> _Batch:
        check_logits(logits, part=c.vocab_group is not None)
        check_labels(labels, logits, "logits")
        targets = c.targets(labels)
        nll = token_nll(logits, targets, **engine)
        return _Batch(nll.flatten(), targets.flatten(), c.ignore_index, _items(num_items_in_batch))

    return _loss(_taking_part(ranks, logits, losses), return_stats, c, ranks)


@overload
def linear_nvamp_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = ...,
    *,
    num_items_in_batch: Tensor | float | None = ...,
    return_stats: Literal[False] = ...,
    **options: Unpack[NVAMPOptions],
) -> Tensor: ...
@overload
def linear_nvamp_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = ...,
    *,
    num_items_in_batch: Tensor | float | None = ...,
    return_stats: Literal[True],
    **options: Unpack[NVAMPOptions],
) -> tuple[Tensor, NVAMPStats]: ...
def linear_nvamp_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    num_items_in_batch: Tensor | float | None = None,
    return_stats: bool = False,
    **options: Unpack[NVAMPOptions],
) -> Tensor | tuple[Tensor, NVAMPStats]:
    """`nvamp.LinearNVAMPLoss` as a function: its options are keyword arguments here."""
    c = Settings(**options).check()
    if has_dtensors(hidden, weight, labels, bias):
        from nvamp.dtensors import local_head

        hidden, weight, labels, bias, vocab_group = local_head(hidden, weight, labels, bias, c.vocab_group)
        c = c._replace(vocab_group=vocab_group)
    ranks = c.ranks

    def losses() -> _Batch:
        check_linear(hidden, weight, bias)
        check_labels(labels, hidden, "hidden")
        args = (hidden, weight, targets := c.targets(labels), bias)
        engine = {"accum_dtype": c.accum_dtype, **c.engine}
        rest = (targets.flatten(), c.ignore_index, _items(num_items_in_batch))
        one_pass = (
            c.vocab_group is None  # its parts would have to meet at every chunk
            and c.gradient in ("scalar", "detached")
            and can_one_pass(hidden, weight, bias, c.backend)
        )
        if one_pass:
            total, largest, nll = linear_nll_sum_max(*args, **engine)
            return _Batch(nll.flatten(), *rest, (total, largest))
        engine |= {"vocab_group": c.vocab_group, "reduce_grad_hidden": c.reduce_grad_hidden}
        return _Batch(linear_token_nll(*args, **engine).flatten(), *rest)

    return _loss(_taking_part(ranks, hidden, losses), return_stats, c, ranks)


def token_nvamp_loss(
    nll: Tensor,
    valid: Tensor | None = None,
    *,
    num_items_in_batch: Tensor | float | None = None,
    return_stats: bool = False,
    alpha: float = 1.0,
    beta: float = 0.02,
    gamma: float = 0.001,
    eps: float = 1e-6,
    gradient: Gradient = "scalar",
    process_group: "Group | None" = None,
    on_stats: Callable[[NVAMPStats], None] | None = None,
) -> Tensor | tuple[Tensor, NVAMPStats]:
    """`nvamp.TokenNVAMPLoss` as a function: its options are keyword arguments here."""
    c = Settings(
        alpha, beta, gamma, eps, gradient=gradient, process_group=process_group, on_stats=on_stats
    ).check()
    ranks = c.ranks
    batch = _taking_part(ranks, nll, lambda: _Batch(*_flat(nll, valid), 0, _items(num_items_in_batch)))
    return _loss(batch, return_stats, c, ranks)


def token_weights(
    nll: Tensor,
    valid: Tensor | None = None,
    *,
    num_items_in_batch: Tensor | float | None = None,
    alpha: float = 1.0,
    beta: float = 0.02,
    gamma: float = 0.001,
    eps: float = 1e-6,
    gradient: Gradient = "scalar",
    process_group: "Group | None" = None,
) -> Tensor:
    """The weight `∂L/∂ℓ` that the loss gives each token, from the losses `nll` [...] in nats.

    From the losses of a first pass without gradient over all micro-batches, it is the exact weight of each
    token in a second one that accumulates gradients; see docs/distributed.md.

    Args:
        nll: [...] losses of the tokens.
        valid: [...] bool, which of them count; all by default. The others get 0.
        process_group: the ranks that hold the batch together. The sum of the gradients of all ranks is then
            that of the batch; for a mean, as DDP makes, multiply by their number.

    Returns:
        [...] in float32, or float64 for float64 losses.

    The other arguments are those of `nvamp.NVAMPLoss`.
    """
    c = Settings(alpha, beta, gamma, eps, gradient=gradient, process_group=process_group).check()
    ranks = c.ranks
    batch = _taking_part(ranks, nll, lambda: _Batch(*_flat(nll, valid), 0, _items(num_items_in_batch)))
    return _evaluate(batch, c, ranks, stats=False).weights.view(nll.shape)


def _flat(nll: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """The losses [tokens] in the dtype of their statistics, 0 where they do not count; and where they do."""
    check_floating("nll", nll)
    if valid is not None and not isinstance(valid, Tensor):
        raise TypeError(f"valid must be a tensor or None, got {type(valid).__name__}")
    if valid is not None and (valid.dtype != torch.bool or valid.shape != nll.shape):
        raise ValueError(
            f"valid must be bool, shaped like nll {list(nll.shape)}, got {valid.dtype} {list(valid.shape)}"
        )
    if valid is not None and valid.device != nll.device:
        raise ValueError(f"valid must be on the device of nll, {nll.device}, got {valid.device}")
    ell = nll.to(accumulate_dtype(nll.dtype)).flatten()
    if valid is None:
        return ell, torch.ones_like(ell, dtype=torch.bool)
    return torch.where(valid.flatten(), ell, 0), valid.flatten()


class _Batch(NamedTuple):
    """The losses of a batch, and which of them count."""

    nll: Tensor  # [tokens], with their gradient unless `sum_and_max` has it
    labels: Tensor  # [tokens] integers, or bool: whether it counts
    ignore_index: int  # the label of those that do not count, whose losses are 0
    items: Items
    sum_and_max: tuple[Tensor, Tensor] | None = None

    @property
    def valid(self) -> Tensor:
        """[tokens] bool: the tokens that count."""
        return self.labels if self.labels.dtype == torch.bool else self.labels != self.ignore_index


def _loss(batch: _Batch, return_stats: bool, c: Settings, ranks: Ranks) -> Tensor | tuple[Tensor, NVAMPStats]:
    """The loss of a batch, and its statistics if anyone wants them."""
    stats_wanted = return_stats or c.on_stats is not None
    result = _evaluate(batch, c, ranks, stats_wanted)
    if batch.sum_and_max is None:
        terms = [(batch.nll, result.weights)]
    else:
        total, largest = batch.sum_and_max
        terms = [(total, result.weights)] + ([] if result.at_max is None else [(largest, result.at_max)])
    if ranks.size > 1:
        terms = [(x, ranks.size * weight) for x, weight in terms]
    loss = _value_with_gradient(result.loss, terms)
    if not stats_wanted:
        return loss
    stats = _stats(batch, result, c)
    if c.on_stats is not None:
        c.on_stats(stats)
    return (loss, stats) if return_stats else loss


def _evaluate(batch: _Batch, c: Settings, ranks: Ranks, stats: bool) -> Result:
    """Loss and weights of a batch, without gradient, by one kernel if the losses are on one GPU."""
    ell, per_token = batch.nll.detach(), batch.sum_and_max is None
    options = {**c.coefficients, "eps": c.eps, "gradient": c.gradient, "per_token": per_token}
    if fused.serves(ell, c.backend, ranks):
        return fused.evaluate(ell, batch.labels, batch.items, ignore_index=batch.ignore_index, **options)
    return objective.evaluate(ell, batch.valid, batch.items, **options, ranks=ranks, all_moments=stats)


def _value_with_gradient(value: Tensor, terms: list[tuple[Tensor, Tensor]]) -> Tensor:
    """A tensor with this value and the gradient of Σ x·w over the terms (x, w), at constant w."""
    if has_transforms() or torch.compiler.is_compiling():
        for x, weight in terms:  # the same, for those who look inside
            of = (x * weight).sum()
            value = value + (of - of.detach())
        return value
    result: Tensor = _ValueWithGradient.apply(value, *(t for term in terms for t in term))  # type: ignore[no-untyped-call]
    return result


class _ValueWithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, *terms: Tensor) -> Tensor:
        ctx.save_for_backward(*terms[1::2])
        return value.detach()  # no input, which would make the loss a view that nobody may change in place

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, *(t for weight in ctx.saved_tensors for t in (grad * weight, None))


def _taking_part(ranks: Ranks, x: Tensor, losses: Callable[[], T]) -> T:
    """losses(), those of x. A rank that cannot compute its own tells the others before it raises."""
    try:
        return losses()
    except (TypeError, ValueError):
        if ranks is not ALONE and isinstance(x, Tensor):
            from nvamp.distributed import abandon

            abandon(ranks, accumulate_dtype(x.dtype), x.device)
        raise


def _items(num_items_in_batch: Items) -> Items:
    if isinstance(num_items_in_batch, Tensor):
        if num_items_in_batch.numel() != 1:
            raise ValueError(
                f"num_items_in_batch must be a single number, got shape {list(num_items_in_batch.shape)}"
            )
        return num_items_in_batch.reshape(())
    if num_items_in_batch is not None and not num_items_in_batch >= 0:
        raise ValueError(f"num_items_in_batch must be at least 0, got {num_items_in_batch}")
    return num_items_in_batch


def _stats(batch: _Batch, result: Result, c: Settings) -> NVAMPStats:
    ell, valid, s, weights = batch.nll.detach(), batch.valid, result.statistics(), result.weights
    if batch.sum_and_max is not None:  # there are none of single tokens yet
        weights = objective.weights(ell, valid, s, **c.coefficients, gradient=c.gradient)
    some = valid.any()

    def over_valid(extreme: Any, elsewhere: float) -> Tensor:
        padded = pad(torch.where(valid, weights, elsewhere), (0, 1), value=elsewhere)  # never empty
        return torch.where(some, extreme(padded), 0)

    return NVAMPStats(
        cross_entropy=s.cross_entropy,
        mean=s.mean,
        std=s.std,
        dispersion=s.dispersion,
        max=s.max,
        max_index=s.max_index,
        num_tokens=s.num_tokens.long(),
        min_weight=over_valid(torch.amin, torch.inf),
        max_weight=over_valid(torch.amax, -torch.inf),
        hardest_share=_hardest_share(ell, valid, weights.abs()),
    )


def _hardest_share(ell: Tensor, valid: Tensor, weights: Tensor) -> Tensor:
    """Of the sum of `weights`, the share of the hardest hundredth of the valid tokens, rounded up."""
    hardest_first = torch.where(valid, ell, -torch.inf).argsort(descending=True, stable=True)
    hardest = torch.arange(ell.numel(), device=ell.device) < (valid.sum() + 99) // 100
    total = weights.sum()
    return torch.where(total == 0, 0, (weights[hardest_first] * hardest).sum() / total)
