"""The linear path for a transformers model: its own forward, with an output layer that computes no logits."""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache, wraps
from inspect import signature, unwrap
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from nvamp.apply import TokenInputs
from nvamp.integrations.columns import token_inputs
from nvamp.integrations.transformers.alignment import loss_shifts
from nvamp.integrations.transformers.deferred import Asked, DeferredLogits
from nvamp.integrations.transformers.model_loss import ModelLoss
from nvamp.losses import LinearLoss


def patch(model: Any, criterion: LinearLoss) -> None:
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
        model: a `PreTrainedModel` with a `torch.nn.Linear` as output layer, or a `PeftModel` of one. Its own
            loss is a cross-entropy of its logits, with the label of the next place, as in causal models, or
            of the same, as in encoder-decoders. Not yet prepared by Accelerate.
        criterion: without `softcap` and `logit_scale` if the model has its own, which are then used.

    Raises:
        TypeError: the model, its output layer or the criterion is of another kind.

    A model that needs its logits for something else raises a `NotImplementedError` in training: see
    docs/architectures.md.

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
    shifts = loss_shifts(model)
    for layer in _output_layers(model):
        _change(layer, _patched_layer)
    _change(model, _patched_model)
    model.loss_function = _LinearModelLoss(criterion, shifts, before)


def unpatch(model: Any) -> None:
    """Makes a patched model what it was before; leaves any other model as it is."""
    model = base_model(model)
    patched = [module for module in model.modules() if isinstance(module, _Patched)]
    for module in patched:
        if "_nvamp_unpatched" not in vars(type(module)):
            raise TypeError(f"{type(module).__name__} is sharded: unpatch a model before it is sharded")
    for module in patched:
        module.__class__ = module._nvamp_unpatched
    loss = vars(model).get("_loss_function")
    if isinstance(loss, _LinearModelLoss):
        del model._loss_function
        if loss.before is not None:
            model.loss_function = loss.before


class _LinearModelLoss(ModelLoss):
    """The loss of a patched model: of deferred logits in training, of logits otherwise."""

    criterion: LinearLoss

    def __init__(self, criterion: LinearLoss, shifts: bool, before: Any) -> None:
        super().__init__(criterion, shifts)
        self.before = before  # the `loss_function` that the model had been given
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
            layer = logits.layer
            changed: dict[str, object] = {**self._own_options(logits)}
            if shifted:
                changed["shift"] = False
            call = criterion._call(num_items_in_batch, inputs)
            return criterion._of_hidden(logits.hidden, layer.weight, labels, logits.bias, call, **changed)
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
    if not isinstance(module, _Patched):
        module.__class__ = patched(type(module))


def _new_patched(base: Any) -> Any:
    cls = _patched_layer(base) if issubclass(base, nn.Linear) else _patched_model(base)
    return cls.__new__(cls)


def _subclass(base: Any, forward: Any) -> Any:
    wraps(base.forward)(forward)
    # Without `__wrapped__`, which Accelerate would follow to the unpatched forward when it unwraps a model.
    del forward.__wrapped__
    forward.__signature__ = signature(base.forward)
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    return type(base.__name__, (_Patched, base), {**names, "forward": forward, "_nvamp_unpatched": base})


@cache
def _patched_layer(base: Any) -> Any:
    """The class `base` of an output layer, except that it defers its logits during a call."""

    def forward(self: Any, hidden: Tensor) -> Any:
        for call in _state.calls:
            if any(layer is self for layer in call.layers):
                return DeferredLogits(hidden, self, call)
        return base.forward(self, hidden)

    return _subclass(base, forward)


@cache
def _patched_model(base: Any) -> Any:
    """The class `base` of a model, except that in training and with labels it computes no logits."""
    position = list(signature(base.forward).parameters).index("labels") - 1
    names_loss = "loss_function" in unwrap(base.forward).__code__.co_names

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # a compiled one leaves the mode out
    def of_logits(loss: _LinearModelLoss, self: Any, *args: Any, **kwargs: Any) -> Any:
        with _OfLogits(loss, kwargs):
            return base.forward(self, *args, **kwargs)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        labels = args[position] if len(args) > position else kwargs.get("labels")
        loss = self.__dict__.get("_loss_function")
        if labels is None or not isinstance(loss, _LinearModelLoss):
            return base.forward(self, *args, **kwargs)
        if not self.training:
            called = loss.called_by_model
            if called or (called is None and names_loss and torch.compiler.is_compiling()):
                return base.forward(self, *args, **kwargs)
            return of_logits(loss, self, *args, **kwargs)
        with _under_way(_Call(base.__name__, loss, _output_layers(self), kwargs)):
            outputs = base.forward(self, *args, **kwargs)
        return _without_logits(outputs, base.__name__)

    return _subclass(base, forward)


def _without_logits(outputs: Any, model: str) -> Any:
    """The outputs without their logits: a tuple or a dict does not hold None for them."""
    mapping = isinstance(outputs, Mapping)
    if outputs.get("loss") is None if mapping else isinstance(outputs[0], DeferredLogits):
        raise NotImplementedError(f"{model} computed no loss of its logits; a patched model needs one")
    if mapping:
        return type(outputs)(**{k: v for k, v in outputs.items() if not isinstance(v, DeferredLogits)})
    return tuple(value for value in outputs if not isinstance(value, DeferredLogits))


def base_model(model: Any) -> Any:
    """The transformers model itself, which a `PeftModel` wraps."""
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    if not hasattr(model, "get_output_embeddings") or not hasattr(model, "loss_function"):
        raise TypeError(f"model must be a transformers model or a PeftModel, got {type(model).__name__}")
    return model


def _check_model(model: Any) -> None:
    name = type(model).__name__
    if "labels" not in signature(model.forward).parameters:
        raise TypeError(f"{name} computes no loss: its forward takes no labels")
    if "forward" in model.__dict__:
        raise TypeError(
            f"the forward of this {name} has been replaced, as Accelerate does for mixed precision or for "
            "several devices: patch the model before it is prepared"
        )


def _output_layers(model: Any) -> list[Any]:
    """The modules that may compute the logits: several if PEFT trains a copy of the output layer."""
    layer = model.get_output_embeddings()
    layers = [layer]
    if hasattr(layer, "modules_to_save"):
        layers = [layer.original_module, *layer.modules_to_save.values()]
    for layer in layers:
        if not isinstance(layer, _Patched) and not _is_plain(layer):
            kind = f"{type(layer).__module__}.{type(layer).__qualname__}"
            raise TypeError(
                f"the output layer of {type(model).__name__} must be a plain torch.nn.Linear, got {kind}: "
                "use a loss of logits, compute_loss_func(Loss(...), model) or loss_function(Loss(...), model)"
            )
    return layers


def _is_plain(layer: Any) -> bool:
    """Whether it computes what a `torch.nn.Linear` does: not quantized, adapted, or wrapped by Accelerate."""
    return getattr(type(layer), "forward", None) is nn.Linear.forward and "forward" not in vars(layer)
