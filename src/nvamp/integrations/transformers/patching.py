"""The linear path for a transformers model: its own forward, with an output layer that computes no logits."""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, wraps
from inspect import signature, unwrap
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from nvamp.apply import TokenInputs
from nvamp.engine import TokenMetrics, linear_token_nll
from nvamp.integrations.columns import token_inputs
from nvamp.integrations.transformers import heads
from nvamp.integrations.transformers.alignment import loss_shifts
from nvamp.integrations.transformers.deferred import Asked, DeferredLogits
from nvamp.integrations.transformers.guard import guarded
from nvamp.integrations.transformers.model_loss import ModelLoss
from nvamp.losses import LinearLoss


def patch(
    model: Any, criterion: LinearLoss, *, eval_logits: bool = True, logits_without_labels: bool = False
) -> None:
    """Makes a causal language model compute `criterion` from its hidden states, without logits, in training.

    In training and with labels the model runs its own forward, but its output layer computes nothing: the
    loss is computed from hidden states and weight, and `logits` of the output is None. In evaluation, or
    without labels, the model is what it was; its loss in evaluation is `nvamp.Loss` with the same objective
    and options.

    The columns `token_weight`, `advantage`, `old_logprob` and `ref_logprob` of the batch, [B, S] like the
    labels, reach the criterion: they are shifted together with `labels`, and must be shifted already if there
    are `shift_labels`. A `Trainer` keeps such columns only with `remove_unused_columns=False`.

    A second patch replaces the criterion; `unpatch` restores the model.

    Args:
        model: a `PreTrainedModel` with a `torch.nn.Linear` as output layer, or what wraps one, such as the
            result of `torch.compile` or a `PeftModel`, which may adapt that layer. Its own loss is a
            cross-entropy of its logits, with the label of the next place, as in causal models, or of the
            same, as in encoder-decoders. Not yet prepared by Accelerate. With `tp_plan="auto"` the layer
            keeps the classes of this rank.
        criterion: without `softcap` and `logit_scale` if the model has its own, which are then used.
        eval_logits: `False` for no logits in evaluation either, if there are labels: all that a `Trainer`
            needs without `compute_metrics`, or with `prediction_loss_only`.
        logits_without_labels: let the model be called in training without labels, for logits with a gradient.
            By default such a call raises, because a loss of these logits is not the criterion's. TRL's
            trainers with a loss of their own, such as `DPOTrainer` and `GKDTrainer`, need no permission.

    Raises:
        TypeError: the model, its output layer or the criterion is of another kind.
        ValueError: the criterion has a `vocab_group` of its own, beside the one of `tp_plan`.

    From then on the model raises a `RuntimeError` if a call would train it with another loss: its forward
    has been replaced by one that computes a loss, such as Liger's; TRL's own `SFTTrainer` calls it; or it is
    called in training without labels. A model that needs its logits for something else raises a
    `NotImplementedError` in training: see docs/architectures.md.

    Example:
        patch(model, LinearLoss(Tail(share=0.05)))
        Trainer(model, args, train_dataset=data).train()
    """
    if not isinstance(criterion, LinearLoss):
        raise TypeError(
            f"criterion must be a LinearLoss, such as LinearLoss(NVAMP()), got {type(criterion).__name__}"
        )
    model = base_model(model)
    before = model.__dict__.get("_loss_function")
    if isinstance(before, _LinearModelLoss):
        before = before.before
    else:
        _check_model(model)
    shifts, layers = loss_shifts(model), heads.layers_of(model)
    for layer in layers:
        heads.check_layer(layer, type(model).__name__)
        heads.check_vocab_group(layer, criterion.vocab_group)
    for layer in layers:
        _change(layer, _patched_layer)
    _change(model, _patched_model)
    model.loss_function = _LinearModelLoss(criterion, shifts, logits_without_labels, before, eval_logits)


def unpatch(model: Any) -> None:
    """Makes a patched model what it was before; leaves any other model as it is.

    Args:
        model: the model, or what wraps it, as for `patch`.

    Raises:
        TypeError: the model was sharded after it was patched, and has not changed.
    """
    model = base_model(model)
    loss = vars(model).get("_loss_function")
    patched = [module for module in model.modules() if isinstance(module, _Patched)]
    is_patched = isinstance(loss, _LinearModelLoss)
    if patched == [model] and isinstance(loss, ModelLoss) and not is_patched:
        return  # its class is for its `loss_function`
    for module in patched:
        if "_nvamp_unpatched" not in vars(type(module)):
            raise TypeError(f"{type(module).__name__} is sharded: unpatch a model before it is sharded")
    for module in patched:
        module.__class__ = module._nvamp_unpatched
        if "_nvamp_forward" in vars(module):
            vars(module)["forward"] = vars(module).pop("_nvamp_forward")
    if is_patched:
        del model._loss_function
        loss = loss.before
    if loss is not None:
        model.loss_function = loss
    if isinstance(loss, ModelLoss):
        watch(model)


def linear_token_nll_of(model: Any, **inputs: Any) -> Callable[[Tensor], tuple[Tensor, TokenMetrics]]:
    """The plain losses of tokens under a patched model, and what their pass finds out, without logits.

    Args:
        model: patched, or what wraps it, in either mode.
        inputs: of the model, without labels.

    Returns:
        `nvamp.functional.linear_token_nll` as a function of the labels alone: [B, S], each of the position
        that it is at. Nothing is shifted here.
    """
    base = base_model(model)
    with _under_way(_Call(type(base).__name__, base.loss_function, heads.layers_of(base), {})):
        logits: Any = logits_of(model(**inputs))
    hidden, weight, bias, vocab_group = heads.head_of(logits)
    options: Any = logits.options if vocab_group is None else {"vocab_group": vocab_group, **logits.options}

    def losses(labels: Tensor) -> tuple[Tensor, TokenMetrics]:
        return linear_token_nll(hidden, weight, labels, bias, return_metrics=True, **options)

    return losses


def watch(model: Any) -> None:
    """Makes the model raise if it trains with a loss other than a `ModelLoss` that is its `loss_function`."""
    if "labels" in signature(type(model).forward).parameters:
        _change(model, _patched_model)


class _LinearModelLoss(ModelLoss):
    """The loss of a patched model: of deferred logits, or of logits in evaluation."""

    criterion: LinearLoss

    def __init__(
        self,
        criterion: LinearLoss,
        shifts: bool,
        logits_without_labels: bool,
        before: Any,
        eval_logits: bool,
    ) -> None:
        super().__init__(criterion, shifts, logits_without_labels)
        self.before = before  # the `loss_function` that the model had been given
        self.eval_logits = eval_logits
        # Whether the model calls this function. One that computes its cross-entropy itself does not.
        self.called_by_model: bool | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        self.called_by_model = True
        return super().__call__(*args, **kwargs)

    def in_place_of(self, asked: Asked, given: Mapping[str, Any]) -> Tensor:
        """The loss in place of the model's own cross-entropy, in a forward with the arguments `given`."""
        self.called_by_model = False
        columns: Any = {name: _like(asked.labels, x) for name, x in token_inputs(given).items()}
        return super().__call__(
            asked.logits,
            None,
            num_items_in_batch=given.get("num_items_in_batch"),
            ignore_index=asked.ignore_index,
            shift_labels=asked.labels,
            **columns,
        )

    def value(
        self,
        logits: Any,
        labels: Tensor,
        shifted: bool,
        num_items_in_batch: Tensor | int | None,
        inputs: TokenInputs,
    ) -> Any:
        criterion = self.criterion
        if isinstance(logits, DeferredLogits):
            hidden, weight, bias, vocab_group = heads.head_of(logits)
            changed: dict[str, object] = {**self._own_options(logits)}
            if vocab_group is not None:
                changed["vocab_group"] = vocab_group
            if shifted:
                changed["shift"] = False
            call = criterion._call(num_items_in_batch, inputs)
            return criterion._of_hidden(hidden, weight, labels, bias, call, **changed)
        if any(call.loss is self for call in _state.calls):
            raise NotImplementedError(
                "the loss got logits that are not from the patched output layer: if the layer has been "
                "replaced, patch again; if the model has several, unpatch it and set model.loss_function = "
                "loss_function(Loss(...), model)"
            )
        return super().value(logits, labels, shifted, num_items_in_batch, inputs)

    def _own_options(self, logits: DeferredLogits) -> dict[str, float]:
        own, c = logits.options, self.criterion
        if own and (c.softcap is not None or c.logit_scale != 1):
            raise ValueError(
                f"{logits.model} caps or scales its logits itself, {own}: the criterion must have neither "
                f"softcap nor logit_scale, got softcap={c.softcap}, logit_scale={c.logit_scale}"
            )
        return own


def _like(labels: Tensor, column: Any) -> Any:
    """A column [B, S] of the batch, flat as the labels that the model has made: all, or without the first."""
    if not isinstance(column, Tensor):
        return column
    following = column[..., 1:].flatten()
    return following if following.shape == labels.shape else column.flatten()


class _Call(NamedTuple):
    """A forward of a patched model during which no logits are computed."""

    model: str
    loss: _LinearModelLoss
    layers: list[nn.Module]
    given: Mapping[str, Any]

    def cross_entropy(self, asked: Asked) -> Tensor:
        return self.loss.in_place_of(asked, self.given)


class _OfLogits(TorchFunctionMode):
    """A patched model in evaluation: the criterion in place of a cross-entropy that it computes itself."""

    def __init__(self, loss: _LinearModelLoss, given: Mapping[str, Any]) -> None:
        super().__init__()
        self.loss, self.given = loss, given

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # A criterion that the model calls as its loss function may call PyTorch's cross-entropy.
        own = func is nn.functional.cross_entropy and not self.loss.called_by_model
        if own and (asked := Asked.of(*args, **kwargs)):
            return self.loss.in_place_of(asked, self.given)
        return func(*args, **kwargs)


class _State(threading.local):
    """The calls under way in this thread. It is no ContextVar because `torch.compile` cannot trace one."""

    def __init__(self) -> None:
        # Set here and not in the class: an attribute that a compiled first call adds would fail its guards.
        self.calls: tuple[_Call, ...] = ()


_state = _State()


@contextmanager
def _under_way(call: _Call) -> Iterator[None]:
    before = _state.calls
    _state.calls = (*before, call)
    try:
        yield
    finally:
        _state.calls = before


class _Patched:
    """The base of the class that a patched module gets, which has the name of its former class.

    So copies, replicas and pickles of it are patched too, and the module itself does not change.
    """

    _nvamp_unpatched: type

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        return _new_patched, (self._nvamp_unpatched,), *reduced[2:]


def _change(module: Any, patched: Any) -> None:
    if isinstance(module, _Patched):
        return
    if "forward" in vars(module):  # of tensor parallelism: it would hide the one of the class
        module._nvamp_forward = vars(module).pop("forward")
    module.__class__ = patched(type(module))


def _new_patched(base: Any) -> Any:
    cls = _patched_model(base) if hasattr(base, "get_output_embeddings") else _patched_layer(base)
    return cls.__new__(cls)


def _subclass(base: Any, forward: Any, **others: Any) -> Any:
    wraps(base.forward)(forward)
    # Without `__wrapped__`, which Accelerate would follow to the unpatched forward when it unwraps a model.
    del forward.__wrapped__
    forward.__signature__ = signature(base.forward)
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    own = {**names, **others, "forward": forward, "_nvamp_unpatched": base}
    return type(base.__name__, (_Patched, base), own)


@cache
def _patched_layer(base: Any) -> Any:
    """The class `base` of an output layer, except that it defers its logits during a call."""

    def forward(self: Any, hidden: Tensor) -> Any:
        for call in _state.calls:
            if any(layer is self for layer in call.layers):
                return heads.deferred(self, base.forward, hidden, call)
        if (own := vars(self).get("_nvamp_forward")) is not None:
            return own(hidden)
        return base.forward(self, hidden)

    return _subclass(base, forward)


@cache
def _patched_model(base: Any) -> Any:
    """The class `base` of a model, except that it trains with its `ModelLoss` and no other.

    If that is the loss of a patched model, it computes no logits with labels, in training at least.
    """
    position = list(signature(base.forward).parameters).index("labels") - 1
    names_loss = "loss_function" in unwrap(base.forward).__code__.co_names

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # a compiled one leaves the mode out
    def of_logits(loss: _LinearModelLoss, self: Any, *args: Any, **kwargs: Any) -> Any:
        with _OfLogits(loss, kwargs):
            return base.forward(self, *args, **kwargs)

    def labels_of(args: Any, kwargs: Any) -> Any:
        return args[position] if len(args) > position else kwargs.get("labels")

    def watched(model: Any, call: Any, args: Any, kwargs: Any) -> Any:
        loss = model.__dict__.get("_loss_function")
        if not isinstance(loss, ModelLoss):
            return call(model, *args, **kwargs)
        fused_head = bool(kwargs.get("fused_lm_head"))
        return guarded(model, loss, lambda: call(model, *args, **kwargs), labels_of(args, kwargs), fused_head)

    def without_logits(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss = self.__dict__.get("_loss_function")
        if labels_of(args, kwargs) is None or not isinstance(loss, _LinearModelLoss):
            return base.forward(self, *args, **kwargs)
        if loss.eval_logits and not self.training:
            called = loss.called_by_model
            if called or (called is None and names_loss and torch.compiler.is_compiling()):
                return base.forward(self, *args, **kwargs)
            return of_logits(loss, self, *args, **kwargs)
        layers = heads.layers_of(self)
        if not all(isinstance(layer, _Patched) for layer in layers):
            raise NotImplementedError(
                f"the output layer of {base.__name__} has been replaced, or been given an adapter, since the "
                "model was patched: patch again"
            )
        with _under_way(_Call(base.__name__, loss, layers, kwargs)):
            outputs = base.forward(self, *args, **kwargs)
        return _without_logits(outputs, base.__name__)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return watched(self, without_logits, args, kwargs)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return watched(self, base.__call__, args, kwargs)

    # Calls are watched as well because other libraries replace the forward of an instance.
    return _subclass(base, forward, __call__=call)


def _without_logits(outputs: Any, model: str) -> Any:
    """The outputs without their logits: a tuple or a dict does not hold None for them."""
    mapping = isinstance(outputs, Mapping)
    if outputs.get("loss") is None if mapping else isinstance(outputs[0], DeferredLogits):
        raise NotImplementedError(f"{model} computed no loss of its logits; a patched model needs one")
    if mapping:
        return type(outputs)(**{k: v for k, v in outputs.items() if not isinstance(v, DeferredLogits)})
    return tuple(value for value in outputs if not isinstance(value, DeferredLogits))


def logits_of(outputs: Any) -> Tensor:
    """The logits [B, S, V] that a model returned, as a `ModelOutput`, a dict or a tuple without a loss."""
    logits: Tensor = outputs["logits"] if isinstance(outputs, Mapping) else outputs[0]
    return logits


def base_model(model: Any) -> Any:
    """The transformers model itself, which PEFT, `torch.compile`, FSDP and others wrap."""
    from transformers import PreTrainedModel

    modules = model.modules() if isinstance(model, nn.Module) else ()
    found = [module for module in modules if isinstance(module, PreTrainedModel)]
    if found and set(found) <= set(found[0].modules()):
        return found[0]
    several = ", which holds several" if found else ""
    raise TypeError(
        f"model must be a transformers model or a PeftModel, or wrap one, got {type(model).__name__}{several}"
    )


def installed_loss(model: Any) -> ModelLoss | None:
    """What `patch` or `loss_function` has installed on the model or on what it wraps, if anything."""
    loss = vars(base_model(model)).get("_loss_function")
    return loss if isinstance(loss, ModelLoss) else None


def _check_model(model: Any) -> None:
    name = type(model).__name__
    if "labels" not in signature(model.forward).parameters:
        raise TypeError(f"{name} computes no loss: its forward takes no labels")
    if "forward" in model.__dict__:
        raise TypeError(
            f"the forward of this {name} has been replaced, as Accelerate does for mixed precision or for "
            "several devices, TRL in its trainers and Liger for its loss: patch the model before it is "
            "prepared, and turn Liger's fused_linear_cross_entropy off"
        )
