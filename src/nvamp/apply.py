"""The bridge from the engine and an objective to a loss: its value, its gradient, its statistics, its ranks.

The engine computes the losses of the tokens, differentiable with any weights. The objective turns their
values into the loss and a weight for each token. This module combines the two in one tensor with a
`backward`. All modules and functions of the library call one of `of_logits`, `of_hidden` and `of_tokens`.
"""

from collections.abc import Callable, Mapping
from dataclasses import fields
from numbers import Real
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict, TypeVar, cast

import torch
from torch import Tensor
from torch.nn.functional import pad

from nvamp import fused
from nvamp.engine import TokenMetrics, can_one_pass, linear_nll_sum, linear_token_nll, token_nll
from nvamp.engine.checks import (
    check_floating,
    check_labels,
    check_linear,
    check_logits,
    check_tensor,
    has_transforms,
)
from nvamp.engine.devices import can_look
from nvamp.engine.options import accumulate_dtype
from nvamp.engine.parts import has_dtensors
from nvamp.objectives.base import Batch, Objective, Result, Statistics
from nvamp.objectives.statistics import statistics
from nvamp.options import (
    DECLARED,
    HUGE,
    LinearNLLOptions,
    LinearOptions,
    LinearSumOptions,
    LogitsOptions,
    NLLOptions,
    TokenOptions,
)
from nvamp.ranks import ALONE, UNKNOWN, Ranks, Term

if TYPE_CHECKING:
    from nvamp.distributed import Group

Items = Tensor | float | None  # num_items_in_batch


class TokenInputs(TypedDict, total=False):
    """What an objective may need for each token beside its loss: real numbers, shaped like the labels.

    They are shifted together with the labels. No gradient flows to them, and they may hold anything for a
    token that does not count.
    """

    token_weight: Tensor | None  # how much the token counts
    advantage: Tensor | None  # the advantage of the token as an action
    old_logprob: Tensor | None  # under the policy that drew the token, nats
    ref_logprob: Tensor | None  # under the reference policy, nats


class NVAMPStats(NamedTuple):
    """The statistics of a loss: scalar tensors without gradient, on the device of the loss; losses in nats.

    With a `process_group` they cover all its ranks, except that `max_index` and the last three cover the
    tokens of this rank. Every objective has the same ones.
    """

    cross_entropy: Tensor  # Σ ℓ / num_items_in_batch
    mean: Tensor  # of the losses of the valid tokens
    std: Tensor  # sqrt(their variance + eps)
    dispersion: Tensor  # mean |ℓ − mean| / std
    max: Tensor  # the largest loss; 0 if no token is valid
    max_index: Tensor  # int64: its row of the flattened logits; −1 if none is valid or another rank has it
    num_tokens: Tensor  # int64: valid tokens
    min_weight: Tensor  # the smallest ∂L/∂ℓ of a valid token
    max_weight: Tensor  # the largest
    hardest_share: Tensor  # the share of Σ |∂L/∂ℓ| on the hardest 1% of the tokens, rounded up
    accuracy: Tensor | None = None  # the share of valid tokens whose label is the likeliest; see `on_stats`
    entropy: Tensor | None = None  # mean entropy of the predictions of valid tokens, nats; the same


Listener = Callable[[NVAMPStats], None]


class Call(NamedTuple):
    """The arguments of one call of a loss, beside its tensors and its options."""

    num_items_in_batch: Items
    inputs: TokenInputs
    return_stats: bool
    on_stats: Listener | None
    metrics: bool = False  # whether the statistics include accuracy and entropy

    @property
    def wants_stats(self) -> bool:
        return self.return_stats or self.on_stats is not None

    @property
    def wants_metrics(self) -> bool:
        return self.metrics and self.wants_stats


Loss = Tensor | tuple[Tensor, NVAMPStats]
MANY = 2**40  # tokens, more than any batch has
T = TypeVar("T")
Chosen = TypeVar("Chosen")


# The three entry points --------------------------------------------------------------------------------


def of_logits(
    objective: Objective, logits: Tensor, labels: Tensor, ignore_index: int, o: LogitsOptions, call: Call
) -> Loss:
    """The loss of logits [..., S, V] and labels [..., S]."""
    vocab_group, batch_group = o["vocab_group"], None
    if has_dtensors(logits, labels):
        from nvamp.dtensors import local_logits  # only here: PyTorch can be built without it

        logits, labels, vocab_group, batch_group = local_logits(logits, labels, vocab_group)
    shared = _Shared.of(o["process_group"], batch_group, "logits")

    def losses() -> _Losses:
        check_logits(logits, part=vocab_group is not None)
        targets, inputs = _targets(objective, labels, logits, "logits", ignore_index, o["shift"], call.inputs)
        found = token_nll(  # type: ignore[call-overload]
            logits,
            targets,
            ignore_index=ignore_index,
            return_metrics=objective.needs_entropy or call.wants_metrics,
            **_of(NLLOptions, o, vocab_group=vocab_group),
        )
        return _Losses.of(found, targets, ignore_index, inputs)

    return _loss(objective, logits, losses, shared, o, call)


def of_hidden(
    objective: Objective,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    o: LinearOptions,
    call: Call,
) -> Loss:
    """The loss of hidden states [..., S, D], the weight [V, D] of the output layer and labels [..., S]."""
    vocab_group, batch_group = o["vocab_group"], None
    if has_dtensors(hidden, weight, labels, bias):
        from nvamp.dtensors import local_head

        local = local_head(hidden, weight, labels, bias, vocab_group)
        hidden, weight, labels, bias, vocab_group, batch_group = local
    shared = _Shared.of(o["process_group"], batch_group, "hidden")

    def losses() -> _Losses:
        check_linear(hidden, weight, bias)
        targets, inputs = _targets(objective, labels, hidden, "hidden", ignore_index, o["shift"], call.inputs)
        few = None
        # Parts of a vocabulary would have to meet at every chunk, and the one pass has no entropies.
        if vocab_group is None and not objective.needs_entropy:
            few = _few_in_one_pass(objective, targets, shared.group)
        if few is not None and can_one_pass(hidden, weight, bias, o["backend"]):
            total, *nll = linear_nll_sum(  # type: ignore[call-overload]
                hidden,
                weight,
                targets,
                bias,
                few=few,
                ignore_index=ignore_index,
                return_metrics=call.wants_metrics,
                **_of(LinearSumOptions, o),
            )
            return _Losses.of(
                tuple(nll) if call.wants_metrics else nll[0], targets, ignore_index, inputs, total
            )
        found = linear_token_nll(  # type: ignore[call-overload]
            hidden,
            weight,
            targets,
            bias,
            ignore_index=ignore_index,
            return_metrics=objective.needs_entropy or call.wants_metrics,
            **_of(LinearNLLOptions, o, vocab_group=vocab_group),
        )
        return _Losses.of(found, targets, ignore_index, inputs)

    return _loss(objective, hidden, losses, shared, o, call)


def of_tokens(
    objective: Objective,
    nll: Tensor,
    valid: Tensor | None,
    entropy: Tensor | None,
    process_group: "Group | None",
    call: Call,
) -> Loss:
    """The loss from per-token losses [...] computed elsewhere."""
    shared = _Shared(process_group)
    return _loss(
        objective, nll, lambda: _given(objective, nll, valid, entropy, call.inputs), shared, {}, call
    )


def weights_of_tokens(
    objective: Objective,
    nll: Tensor,
    valid: Tensor | None,
    entropy: Tensor | None,
    process_group: "Group | None",
    call: Call,
) -> Tensor:
    """The weights ∂L/∂ℓ for losses nll [...], shaped like them."""

    def computed(ranks: Ranks) -> Tensor:
        losses = _given(objective, nll, valid, entropy, call.inputs)
        items = _items(call.num_items_in_batch)
        weights = _judge(objective, losses, items, ranks, None).weights()
        return torch.where(losses.valid, weights, 0).view(nll.shape)

    return _together(objective, process_group, {}, nll, call, computed)


# From losses to the loss -------------------------------------------------------------------------------


class _Shared(NamedTuple):
    """The ranks that share a batch.

    `of_mean`: their gradients are such that the mean over the ranks, which DDP and FSDP take, is that of the
    batch. Otherwise the sum is.
    """

    group: "Group | None"
    of_mean: bool = True

    @classmethod
    def of(cls, process_group: "Group | None", batch_group: "Group | None", name: str) -> "_Shared":
        """The group of the option, or of the mesh of DTensors; of their gradients PyTorch takes the sum."""
        if batch_group is None:
            return cls(process_group)
        if process_group is not None:
            raise ValueError(
                f"process_group must be None if {name} is a DTensor sharded over the batch: its mesh has the "
                "ranks that share it"
            )
        return cls(batch_group, of_mean=False)


class _Losses(NamedTuple):
    """The losses of the tokens of this rank, and which of them count."""

    nll: Tensor  # [tokens] in the dtype of losses, with gradient; 0 if the token does not count
    labels: Tensor  # [tokens] integers, or bool: whether it counts
    ignore_index: int  # the label of those that do not count
    inputs: Mapping[str, Tensor] = {}  # [tokens] each
    entropy: Tensor | None = None  # [tokens], with gradient unless there is a `total`
    correct: Tensor | None = None  # [tokens] bool: the label is the likeliest class
    total: Tensor | None = None  # Σ nll, with gradient; if set, only a few tokens of nll have a gradient

    @classmethod
    def of(
        cls,
        found: Tensor | tuple[Tensor, TokenMetrics],
        targets: Tensor,
        ignore_index: int,
        inputs: Mapping[str, Tensor],
        total: Tensor | None = None,
    ) -> "_Losses":
        """The losses from results of the engine, [...]."""
        nll, metrics = (found, None) if isinstance(found, Tensor) else found
        losses = cls(nll.flatten(), targets.flatten(), ignore_index, inputs, total=total)
        if metrics is None:
            return losses
        return losses._replace(entropy=metrics.entropy.flatten(), correct=metrics.correct.flatten())

    @property
    def valid(self) -> Tensor:
        """[tokens] bool: the tokens that count."""
        return self.labels if self.labels.dtype == torch.bool else self.labels != self.ignore_index

    def batch(self, items: Items, ranks: Ranks) -> Batch:
        """The losses as an objective sees them."""
        entropy = None if self.entropy is None else self.entropy.detach()
        return Batch(self.nll.detach(), self.valid, items, ranks, self.inputs, entropy)


def _loss(
    objective: Objective,
    x: Tensor,
    losses_of_x: Callable[[], _Losses],
    shared: _Shared,
    o: Mapping[str, object],
    call: Call,
) -> Loss:
    """The result of a call of a loss: its value with its gradient and, if asked for, its statistics."""

    def computed(ranks: Ranks) -> tuple[Tensor, NVAMPStats | None]:
        losses, items = losses_of_x(), _items(call.num_items_in_batch)
        result = _judge(objective, losses, items, ranks, cast("str | None", o.get("backend")))
        times = ranks.size if shared.of_mean else 1
        loss = _value_with_gradient(result.loss, _terms(losses, result, times))
        if not call.wants_stats:
            return loss, None
        stats = _stats(losses.batch(items, ranks), result)
        if call.metrics and losses.correct is not None and losses.entropy is not None:
            means = _means(losses.batch(items, ranks), losses.correct, losses.entropy.detach())
            stats = stats._replace(accuracy=means[0], entropy=means[1])
        return loss, stats

    loss, stats = _together(objective, shared.group, o, x, call, computed)
    if stats is None:
        return loss
    if call.on_stats is not None:
        call.on_stats(stats)
    return (loss, stats) if call.return_stats else loss


def _judge(objective: Objective, losses: _Losses, items: Items, ranks: Ranks, backend: str | None) -> Result:
    """Loss and weights, without gradient: from one kernel if it applies, else from the objective."""
    ell = losses.nll.detach()
    if fused.serves(objective, ell, backend, ranks):
        apart = losses.total is not None
        return fused.evaluate(objective, ell, losses.labels, items, losses.ignore_index, apart)
    result = objective.evaluate(losses.batch(items, ranks))
    _check_result(objective, losses, result)
    return result


def _check_result(objective: Objective, losses: _Losses, result: object) -> None:
    """Raises unless the result of an objective's `evaluate` is what it says of itself."""
    name = type(objective).__name__
    if not isinstance(result, Result):
        raise TypeError(f"{name}.evaluate must return a Result, got {type(result).__name__}")
    if result.shared is None and (result.per_token is None or losses.total is not None):
        few = "" if result.per_token is None else ", as its few_weights says"
        raise TypeError(f"{name}.evaluate must return a Result with `shared`{few}")
    if result.entropy_weights is not None and not objective.needs_entropy:
        raise TypeError(f"{name} weighs the entropy, so its needs_entropy must be True")


def _terms(losses: _Losses, result: Result, times: int) -> list[tuple[Tensor, Tensor]]:
    """Pairs (x, w): so many times the gradient of the loss is that of Σ x·w at constant w."""
    terms: list[tuple[Tensor, Tensor | None]]
    if losses.total is None:
        # The weights of other tokens do not matter: their losses have no gradient.
        terms = [(losses.nll, result.weights().expand_as(losses.nll))]
    else:
        terms = [(losses.total, result.shared), (losses.nll, result.per_token)]
    if losses.entropy is not None:
        terms.append((losses.entropy, result.entropy_weights))
    if _is_traced():  # the value is then computed from the terms, where 0·NaN would show
        terms = [(x, w if w is None or not w.dim() else torch.where(losses.valid, w, 0)) for x, w in terms]
    return [(x, w if times == 1 else times * w) for x, w in terms if w is not None]


def _value_with_gradient(value: Tensor, terms: list[tuple[Tensor, Tensor]]) -> Tensor:
    """A tensor with this value and the gradient of Σ x·w over the terms (x, w), at constant w."""
    if _is_traced():
        for x, weight in terms:  # the same in operations that a transform or a compiler can see
            of = torch.where(weight == 0, 0, x * weight).sum()  # a loss without weight may be infinite
            value = value + (of - of.detach())
        return value
    result: Tensor = _ValueWithGradient.apply(value, *(t for term in terms for t in term))  # type: ignore[no-untyped-call]
    return result


def _is_traced() -> bool:
    return has_transforms() or torch.compiler.is_compiling()


class _ValueWithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, *terms: Tensor) -> Tensor:
        ctx.save_for_backward(*terms[1::2])
        return value.detach()  # an input as it is would make the loss a view, not to be changed in place

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, *(t for weight in ctx.saved_tensors for t in (grad * weight, None))


def _few_in_one_pass(objective: Objective, labels: Tensor, process_group: "Group | None") -> int | None:
    """How many tokens may have their own weight if the linear path takes one pass; None for two passes."""
    tokens = labels.numel()
    few = objective.few_weights(tokens if process_group is None else MANY)
    if few is None or few <= 1:
        return few
    if process_group is not None:  # this rank may have any number of the hardest tokens of all
        return tokens if can_look(labels) else None
    return few if 2 * few <= tokens else None  # they take two products more: 3 + 2·few/tokens, or 4


# Arguments ---------------------------------------------------------------------------------------------


def _together(
    objective: Objective,
    process_group: "Group | None",
    o: Mapping[str, object],
    x: object,
    call: Call,
    computed: Callable[[Ranks], T],
) -> T:
    """What is computed from the tensor x among ranks that call it together.

    If it raises, this rank first makes the exchanges that are left, with NaN. The other ranks then get a loss
    of NaN; otherwise they would wait for this rank forever.
    """
    if process_group is None:
        return computed(ALONE)
    from nvamp.distributed import exchange_of

    like = x if isinstance(x, Tensor) else torch.empty(0)
    nll = torch.full((1,), torch.nan, dtype=accumulate_dtype(like.dtype), device=like.device)
    terms: dict[str, Term] = {"the objective": UNKNOWN}
    if not torch.compiler.is_compiling():
        options = {field.name: getattr(objective, field.name) for field in fields(objective)}
        terms = {
            "the objective": type(objective).__name__ + _numbers(options),
            "the loss of a token": _numbers({name: o.get(name) for name in DECLARED[TokenOptions]}),
            "the dtype": str(nll.dtype),
            "num_items_in_batch": "not given" if call.num_items_in_batch is None else "given",
            "return_stats": f"{call.wants_stats}, token_metrics {call.wants_metrics}",
        }
    kind = (type(objective), nll.dtype, call.wants_stats, call.wants_metrics)
    exchange = exchange_of(process_group, terms, kind)

    try:
        return computed(exchange.ranks)
    except Exception:
        if exchange.in_step:
            inputs = dict.fromkeys((*objective.inputs, *objective.optional_inputs), nll)
            batch = Batch(nll, torch.ones_like(nll, dtype=torch.bool), None, exchange.rest(), inputs, nll)
            result = objective.evaluate(batch)
            if call.wants_stats:
                _statistics_of(batch, result)
            if call.wants_metrics:
                _means(batch, nll, nll)
        raise


def _numbers(options: Mapping[str, object]) -> str:
    """Those options that are the same text in every process."""
    return str({name: x for name, x in options.items() if isinstance(x, bool | int | float | str)})


def _items(num_items_in_batch: Items) -> Items:
    if isinstance(num_items_in_batch, Tensor):
        check_tensor("num_items_in_batch", num_items_in_batch)
        if num_items_in_batch.is_complex():
            raise TypeError(f"num_items_in_batch must be real, got {num_items_in_batch.dtype}")
        if num_items_in_batch.numel() != 1:
            raise ValueError(
                f"num_items_in_batch must be a single number, got shape {list(num_items_in_batch.shape)}"
            )
        return num_items_in_batch.reshape(())
    if num_items_in_batch is None:
        return None
    given: object = num_items_in_batch
    if isinstance(given, bool) or not isinstance(given, Real | torch.SymInt | torch.SymFloat):
        raise TypeError(f"num_items_in_batch must be a number or a tensor of one, got {given!r}")
    if not num_items_in_batch >= 0:
        raise ValueError(f"num_items_in_batch must be at least 0, got {num_items_in_batch}")
    if num_items_in_batch > HUGE:
        raise ValueError(f"num_items_in_batch must be a number that float32 can hold, got {given}")
    return num_items_in_batch


def _of(options: type[Chosen], o: LogitsOptions | LinearOptions, **changed: object) -> Chosen:
    """The options that the class `options` has, some of them `changed`."""
    chosen = {name: o[name] for name in DECLARED[options]} | changed  # type: ignore[literal-required]
    return cast(Chosen, chosen)


def _shifted(x: Tensor, shift: bool, fill: int = 0) -> Tensor:
    """The x [..., S] that belongs to each row: with `shift` the next one, and `fill` for the last row."""
    return pad(x[..., 1:], (0, 1), value=fill)[..., : x.shape[-1]] if shift else x


def _targets(
    objective: Objective,
    labels: Tensor,
    x: Tensor,
    name: str,
    ignore_index: int,
    shift: bool,
    inputs: TokenInputs,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The label [...] of each row of x [..., features], called `name`, and the inputs [tokens] beside it."""
    labels = check_labels(labels, x, name)
    if shift and labels.dim() == 1 and not has_transforms():  # under vmap a row is all there is
        raise ValueError(
            f"labels must have shape [batch, seq] to be shifted, got {list(labels.shape)}: flattened labels "
            "would be shifted from one row to the next; give shift=False for labels that are shifted already"
        )
    targets = _shifted(labels, shift, ignore_index)
    if not (inputs or objective.inputs):
        return targets, {}
    dtype = accumulate_dtype(x.dtype)
    return targets, _inputs(objective, inputs, labels, targets != ignore_index, dtype, shift)


def _inputs(
    objective: Objective, given: TokenInputs, grid: Tensor, valid: Tensor, dtype: torch.dtype, shift: bool
) -> dict[str, Tensor]:
    """The per-token inputs of an objective [tokens], checked against the shape [...] of the labels."""
    possible, name_of = (*objective.inputs, *objective.optional_inputs), type(objective).__name__
    inputs = {name: x for name, x in given.items() if x is not None}
    for name in inputs:
        if name not in possible:
            takes = ", ".join(possible) or "no per-token inputs"
            raise TypeError(f"{name} is not an input of {name_of}, which takes {takes}")
    for name in objective.inputs:
        if name not in inputs:
            raise TypeError(
                f"{name} is missing: {name_of} needs it, shaped like the labels {list(grid.shape)}"
            )
    kept = {}
    for name, x in cast(dict[str, Tensor], inputs).items():
        _check_input(name, x, grid)
        kept[name] = torch.where(valid, _shifted(x.detach().to(dtype), shift), 0).flatten()
    return kept


def _check_input(name: str, x: Tensor, grid: Tensor) -> None:
    check_tensor(name, x)
    if x.is_complex():
        raise TypeError(f"{name} must be real, got {x.dtype}")
    if x.shape != grid.shape:
        raise ValueError(
            f"{name} must have the shape of the labels, {list(grid.shape)}, with each number at the place of "
            f"its label, got {list(x.shape)}"
        )
    if x.device != grid.device:
        raise ValueError(f"{name} must be on the device of the labels, {grid.device}, got {x.device}")


def _given(
    objective: Objective, nll: Tensor, valid: Tensor | None, entropy: Tensor | None, inputs: TokenInputs
) -> _Losses:
    """The caller's losses [...] in the dtype of statistics, with their inputs and entropies."""
    check_floating("nll", nll)
    if valid is not None:
        check_tensor("valid", valid)
    if valid is not None and (valid.dtype != torch.bool or valid.shape != nll.shape):
        raise ValueError(
            f"valid must be bool, shaped like nll {list(nll.shape)}, got {valid.dtype} {list(valid.shape)}"
        )
    if valid is not None and valid.device != nll.device:
        raise ValueError(f"valid must be on the device of nll, {nll.device}, got {valid.device}")
    if objective.needs_entropy:
        if entropy is None:
            raise TypeError(f"entropy is missing: {objective} needs it, shaped like nll {list(nll.shape)}")
        _check_input("entropy", entropy, nll)
    counts = torch.ones_like(nll, dtype=torch.bool) if valid is None else valid
    dtype = accumulate_dtype(nll.dtype)

    def known(x: Tensor) -> Tensor:
        return (x.to(dtype) if valid is None else torch.where(valid, x.to(dtype), 0)).flatten()

    return _Losses(
        known(nll),
        counts.flatten(),
        0,
        _inputs(objective, inputs, nll, counts, dtype, shift=False),
        known(entropy) if entropy is not None and objective.needs_entropy else None,
    )


# Statistics --------------------------------------------------------------------------------------------


def _statistics_of(batch: Batch, result: Result) -> Statistics:
    return statistics(batch) if result.statistics is None else result.statistics()


def _stats(batch: Batch, result: Result) -> NVAMPStats:
    ell, valid, s = batch.nll, batch.valid, _statistics_of(batch, result)
    weights = torch.where(valid, result.weights(), 0)
    some = valid.any()

    def over_valid(extreme: Callable[[Tensor], Tensor], elsewhere: float) -> Tensor:
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


def _means(batch: Batch, *x: Tensor) -> list[Tensor]:
    """The mean of each x [tokens] over the valid tokens of all ranks, 0 if there is none: one all-reduce."""
    n, *sums = batch.sums(*(each.to(batch.nll.dtype) for each in x))
    return [total / n.clamp(min=1) for total in sums]


def _hardest_share(ell: Tensor, valid: Tensor, weights: Tensor) -> Tensor:
    """The share of the sum of `weights` on the hardest hundredth of the valid tokens, rounded up."""
    hardest_first = torch.where(valid, ell, -torch.inf).argsort(descending=True, stable=True)
    hardest = torch.arange(ell.numel(), device=ell.device) < (valid.sum() + 99) // 100
    total = weights.sum()
    return torch.where(total == 0, 0, (weights[hardest_first] * hardest).sum() / total)
