"""NVAMP, or any other criterion, as the loss of a Hugging Face model, or of the `Trainer`: docs/transformers.md."""

import copy
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, wraps
from inspect import signature
from typing import Any, NamedTuple, Protocol, TypeVar

from torch import Tensor, nn

from nvamp import LinearNVAMPLoss, NVAMPLoss
from nvamp.functional import Settings
from nvamp.integrations.deferred import DeferredLogits

__all__ = ["Criterion", "LossFunction", "compute_loss_func", "logits_of", "loss_function", "patch", "unpatch"]

# (logits [B, S, V], labels [B, S], num_items_in_batch=...) -> scalar; it shifts the labels itself.
Criterion = Callable[..., Tensor]
C = TypeVar("C", bound=Criterion)


class LossFunction(Protocol):
    """What `Trainer(compute_loss_func=...)` calls."""

    def __call__(
        self, outputs: Any, labels: Tensor | None, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor: ...


def compute_loss_func(criterion: Criterion) -> LossFunction:
    """`criterion` as the `compute_loss_func` of a `Trainer`, which then leaves the model's own loss out.

    Where the `Trainer` gives the number of tokens of the optimizer step, the loss of a criterion with a
    `process_group` is divided by the size of the group; docs/transformers.md says why.

    Args:
        criterion: called as `criterion(logits [B, S, V], labels [B, S], num_items_in_batch=...)`, gives a
            scalar. The labels are not shifted; shifting them is the criterion's part, as `NVAMPLoss()` does.

    Example:
        Trainer(model, args, train_dataset=data, compute_loss_func=compute_loss_func(NVAMPLoss()))

        # On several ranks; it is `TrainingArguments` that makes the group.
        args = TrainingArguments(...)
        criterion = NVAMPLoss(process_group=torch.distributed.group.WORLD)
        Trainer(model, args, train_dataset=data, compute_loss_func=compute_loss_func(criterion))
    """

    def loss(outputs: Any, labels: Tensor | None, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        if labels is None:
            raise ValueError("labels are missing: the batches of the Trainer need a column named 'labels'")
        value = criterion(logits_of(outputs), labels, num_items_in_batch=num_items_in_batch)
        return _share(value, num_items_in_batch, criterion)

    return loss


def loss_function(criterion: Criterion) -> "ModelLoss":
    """`criterion` as `model.loss_function`: the model computes its logits, and this loss of them.

    It is called as transformers' `ForCausalLMLoss` is, and with `num_items_in_batch` follows the convention
    of `compute_loss_func`.

    Args:
        criterion: as for `compute_loss_func`. For batches with `shift_labels`, shifted before they were split
            over ranks, it needs an attribute `shift`, as `NVAMPLoss` has.

    Example:
        model.loss_function = loss_function(NVAMPLoss())
    """
    return ModelLoss(criterion)


class ModelLoss:
    """What `model.loss_function` calls, with a criterion of logits."""

    def __init__(self, criterion: Criterion) -> None:
        self.criterion = criterion

    def __call__(
        self,
        logits: Any,
        labels: Tensor | None,
        vocab_size: int | None = None,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """The loss, a scalar.

        Args:
            logits: [B, S, V].
            labels: [B, S]; not looked at where there are `shift_labels`.
            vocab_size: not used: it is V.
            shift_labels: [B, S], for the logits at the same place.
            kwargs: not used, as in transformers.
        """
        own_index = getattr(self.criterion, "ignore_index", -100)
        if ignore_index not in (-100, own_index):
            raise ValueError(f"the criterion has ignore_index={own_index}, the model asks for {ignore_index}")
        options: dict[str, Any] = {} if shift_labels is None else {"shift": False}
        targets = labels if shift_labels is None else shift_labels
        if targets is None:
            raise ValueError("labels are missing: neither labels nor shift_labels were given")
        if isinstance(num_items_in_batch, Tensor):  # of the first device, where a model lies on several
            num_items_in_batch = num_items_in_batch.to(logits.device, non_blocking=True)
        value = self._value(logits, targets.to(logits.device), options, num_items_in_batch=num_items_in_batch)
        return _share(value, num_items_in_batch, self.criterion)

    def _value(self, logits: Any, labels: Tensor, options: dict[str, Any], **items: Any) -> Tensor:
        return _with(self.criterion, options)(logits, labels, **items)


def patch(model: Any, criterion: LinearNVAMPLoss) -> None:
    """Makes a causal language model compute `criterion` from its hidden states, without logits, in training.

    In training and with labels the model runs its own forward, but its output layer computes nothing: the
    loss takes hidden states and weight. `logits` of the output is then None. In evaluation, or without
    labels, the model is what it was; a loss in evaluation is that of `NVAMPLoss` with the same options.

    A second patch replaces the criterion; `unpatch` takes all of it back.

    Args:
        model: a `PreTrainedModel` with a `torch.nn.Linear` as output layer, whose loss is transformers'
            `ForCausalLMLoss`, or a `PeftModel` of one. Not yet prepared by Accelerate, nor sharded.
        criterion: without `softcap` and `logit_scale` where the model has its own, which are taken over.

    Raises:
        TypeError: a model, output layer or criterion that this is not for.

    A model that needs its logits for something else raises a `NotImplementedError` in training: see
    docs/architectures.md.

    Example:
        patch(model, LinearNVAMPLoss())
        Trainer(model, args, train_dataset=data).train()
    """
    if not isinstance(criterion, LinearNVAMPLoss):
        raise TypeError(f"criterion must be a LinearNVAMPLoss, got {type(criterion).__name__}")
    model = _base_model(model)
    before = model.__dict__.get("_loss_function")
    if isinstance(before, _LinearModelLoss):
        before = before.before
    else:
        _check_model(model, before)
    layers = _output_layers(model)
    for layer in layers:
        _check_layer(layer, model)
    for layer in layers:
        if not isinstance(layer, _Patched):
            layer.__class__ = _patched_layer(type(layer))
    if not isinstance(model, _Patched):
        model.__class__ = _patched_model(type(model))
    model.loss_function = _LinearModelLoss(criterion, before)


def unpatch(model: Any) -> None:
    """Makes a patched model what it was before; any other is left as it is."""
    model = _base_model(model)
    if not isinstance(model, _Patched):
        return
    for module in (model, *model.modules()):
        if isinstance(module, _Patched):
            if "_nvamp_unpatched" not in type(module).__dict__:
                raise TypeError(f"{type(module).__name__}: unpatch a model before it is sharded")
            module.__class__ = module._nvamp_unpatched
    before = model.__dict__.pop("_loss_function", None)
    if isinstance(before, _LinearModelLoss):
        before = before.before
    if before is not None:
        model.loss_function = before


class _LinearModelLoss(ModelLoss):
    """The loss of a patched model, of deferred logits in training and of logits elsewhere."""

    def __init__(self, criterion: LinearNVAMPLoss, before: Any) -> None:
        super().__init__(criterion)
        self.before = before  # the `loss_function` that the model had been given

    def _value(self, logits: Any, labels: Tensor, options: dict[str, Any], **items: Any) -> Tensor:
        if isinstance(logits, DeferredLogits):
            options = options | self._own_options(logits)
            layer = logits.layer
            return _with(self.criterion, options)(logits.hidden, layer.weight, labels, layer.bias, **items)
        if any(call.loss is self for call in _state.calls):
            raise NotImplementedError(
                "the logits in the loss are not of the output layer that was patched: where that has been "
                "replaced, patch again; where the model has several, set model.loss_function = "
                "loss_function(NVAMPLoss(...)) instead"
            )
        twin = NVAMPLoss(**{name: getattr(self.criterion, name) for name in Settings._fields})
        return _with(twin, options)(logits, labels, **items)

    def _own_options(self, logits: DeferredLogits) -> dict[str, float]:
        options = logits.options
        if options and (self.criterion.softcap is not None or self.criterion.logit_scale != 1):
            raise ValueError(
                f"{logits.model} has its own {' and '.join(options)}: the criterion must have neither "
                f"softcap nor logit_scale, got softcap={self.criterion.softcap}, "
                f"logit_scale={self.criterion.logit_scale}"
            )
        return options

    criterion: LinearNVAMPLoss


class _Call(NamedTuple):
    """A forward of a patched model that is to compute no logits."""

    model: str
    loss: _LinearModelLoss
    layers: list[nn.Module]


class _State(threading.local):
    """The calls under way in this thread. Not a ContextVar: `torch.compile` cannot trace one."""

    calls: tuple[_Call, ...] = ()


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
    """A patched module is of a class of its own, with the name of the one that it was of.

    So copies, replicas and pickles of it are patched as well, and the module itself has not changed.
    """

    _nvamp_unpatched: type

    def __reduce_ex__(self, protocol: Any) -> Any:
        _, _, *state = super().__reduce_ex__(protocol)
        return _new_patched, (self._nvamp_unpatched,), *state


def _new_patched(base: type) -> Any:
    cls = _patched_layer(base) if issubclass(base, nn.Linear) else _patched_model(base)
    return cls.__new__(cls)


def _subclass(base: Any, forward: Any) -> Any:
    wraps(base.forward)(forward)
    # Not `__wrapped__`: Accelerate, when it takes its own wrappers off, would go on to the unpatched forward.
    del forward.__wrapped__
    forward.__signature__ = signature(base.forward)
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    return type(base.__name__, (_Patched, base), {**names, "forward": forward, "_nvamp_unpatched": base})


@cache
def _patched_layer(base: Any) -> Any:
    """The class `base` of an output layer, which in a call under way defers its logits."""

    def forward(self: Any, hidden: Tensor) -> Any:
        if self.training:
            for call in _state.calls:
                if any(layer is self for layer in call.layers):
                    return DeferredLogits(hidden, self, call.model)
        return base.forward(self, hidden)

    return _subclass(base, forward)


@cache
def _patched_model(base: Any) -> Any:
    """The class `base` of a model, which in training and with labels computes no logits."""
    position = list(signature(base.forward).parameters).index("labels") - 1

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        labels = args[position] if len(args) > position else kwargs.get("labels")
        loss = self.__dict__.get("_loss_function")
        if labels is None or not self.training or not isinstance(loss, _LinearModelLoss):
            return base.forward(self, *args, **kwargs)
        with _under_way(_Call(base.__name__, loss, _output_layers(self))):
            outputs = base.forward(self, *args, **kwargs)
        return _without_logits(outputs, base.__name__)

    return _subclass(base, forward)


def _without_logits(outputs: Any, model: str) -> Any:
    """The outputs without logits, as those of a model that has none: None is not in a tuple or a dict."""
    mapping = isinstance(outputs, Mapping)
    if outputs.get("loss") is None if mapping else isinstance(outputs[0], DeferredLogits):
        raise NotImplementedError(f"{model} computed no loss of its logits, and a patched model needs one")
    if mapping:
        return type(outputs)(**{k: v for k, v in outputs.items() if not isinstance(v, DeferredLogits)})
    return tuple(value for value in outputs if not isinstance(value, DeferredLogits))


def _base_model(model: Any) -> Any:
    """The transformers model: that of a `PeftModel` is within."""
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    if not hasattr(model, "get_output_embeddings") or not hasattr(model, "loss_function"):
        raise TypeError(f"model must be a transformers model or a PeftModel, got {type(model).__name__}")
    return model


def _check_model(model: Any, own_loss: Any) -> None:
    from transformers.loss.loss_utils import ForCausalLMLoss

    name = type(model).__name__
    if "labels" not in signature(model.forward).parameters:
        raise TypeError(f"{name} computes no loss: its forward takes no labels")
    if own_loss is None and model.loss_function is not ForCausalLMLoss:
        raise TypeError(f"{name} has the loss {model.loss_function.__name__}, which is not a causal model's")
    if "forward" in model.__dict__:
        raise TypeError(
            f"the forward of this {name} has been replaced, as Accelerate does for mixed precision or several "
            "devices: patch the model before"
        )


def _output_layers(model: Any) -> list[Any]:
    """The modules that may make the logits: several where PEFT trains a copy of the output layer."""
    layer = model.get_output_embeddings()
    return (
        [layer.original_module, *layer.modules_to_save.values()]
        if hasattr(layer, "modules_to_save")
        else [layer]
    )


def _check_layer(layer: Any, model: Any) -> None:
    if isinstance(layer, _Patched):
        return
    if getattr(type(layer), "forward", None) is not nn.Linear.forward or "forward" in layer.__dict__:
        kind = f"{type(layer).__module__}.{type(layer).__qualname__}"
        raise TypeError(
            f"the output layer of {type(model).__name__} must be a plain torch.nn.Linear, got {kind}: set "
            "model.loss_function = loss_function(NVAMPLoss(...)) instead"
        )


def _with(criterion: C, options: dict[str, Any]) -> C:
    """The criterion with some options changed."""
    if not options:
        return criterion
    changed = copy.copy(criterion)
    for name, value in options.items():
        if not hasattr(changed, name):
            raise TypeError(f"shift_labels need a criterion with an attribute 'shift', got {criterion!r}")
        setattr(changed, name, value)
    return changed


def _share(value: Tensor, num_items_in_batch: Tensor | int | None, criterion: Criterion) -> Tensor:
    """This rank's part of a loss that the `Trainer` adds up over ranks, where it gives a number of tokens."""
    group = getattr(criterion, "process_group", None)
    if group is None or num_items_in_batch is None:
        return value
    from nvamp.distributed import ranks_of  # only here: PyTorch can be built without it

    return value / ranks_of(group).size


def logits_of(outputs: Any) -> Tensor:
    """The logits [B, S, V] of what a model without labels returns: a `ModelOutput`, a dict or a tuple."""
    logits: Tensor = outputs["logits"] if isinstance(outputs, Mapping) else outputs[0]
    return logits
