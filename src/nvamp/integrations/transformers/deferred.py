"""A stand-in for the logits of a patched model: it knows how they would be computed, and does not do it."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn


class Run(Protocol):
    """A forward of a patched model."""

    @property
    def model(self) -> str:
        """The name of the model's class, for errors."""
        ...

    def cross_entropy(self, asked: "Asked") -> Tensor:
        """The criterion in place of a cross-entropy that the model computes itself."""
        ...


class Asked(NamedTuple):
    """A call of `torch.nn.functional.cross_entropy` whose place a criterion can take."""

    logits: Any
    labels: Tensor
    ignore_index: int

    @classmethod
    def of(
        cls,
        input: Any,
        target: Tensor,
        weight: Tensor | None = None,
        size_average: None = None,
        ignore_index: int = -100,
        reduce: None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
    ) -> "Asked | None":
        """The call, if it asks for the mean loss of logits [N, V] and labels [N], without any option."""
        plain = weight is None and reduction == "mean" and not label_smoothing
        return cls(input, target, ignore_index) if plain and len(input.shape) == 2 else None


class DeferredLogits:
    """The logits of an output layer, not computed: `scale·x`, or `cap·tanh(scale·x)`, x = layer(hidden).

    Models scale, soft-cap and cast their logits before the loss, and some add a bias; these operations are
    recorded and become the loss's `logit_scale`, `softcap` and bias. Those that compute their loss themselves
    take rows and flatten; `torch.nn.functional.cross_entropy` of the result is the criterion's loss. Anything
    else raises a `NotImplementedError` that names it.

    Attributes:
        hidden: [..., D], the input of the layer.
        layer: a `torch.nn.Linear`; the loss reads its weight when it is computed.
        run: the forward to which they belong.
    """

    def __init__(
        self,
        hidden: Tensor,
        layer: nn.Linear,
        run: Run,
        scale: float = 1.0,
        cap: float | None = None,
        added: Tensor | None = None,
    ) -> None:
        self.hidden = hidden
        self.layer = layer
        self.run = run
        self._scale = scale
        self._cap = cap
        self._added = added

    @property
    def model(self) -> str:
        return self.run.model

    @property
    def bias(self) -> Tensor | None:
        """The bias of the layer and what the model adds to its logits, [V]."""
        if self._added is None:
            return self.layer.bias
        added = self._added.flatten().to(self.layer.weight)
        return added if self.layer.bias is None else self.layer.bias + added

    @property
    def options(self) -> dict[str, float]:
        """The options with which a loss of x is the loss of these logits."""
        if self._cap is not None:
            return {"softcap": self._cap, "logit_scale": self._scale * self._cap}
        return {} if self._scale == 1 else {"logit_scale": self._scale}

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.hidden.shape[:-1], self.layer.out_features))

    @property
    def dtype(self) -> torch.dtype:
        return self.layer.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    def to(self, *args: Any, **kwargs: Any) -> "DeferredLogits":
        """Itself: the loss is computed in at least float32, on the device of the hidden states."""
        return self

    def contiguous(self) -> "DeferredLogits":
        return self

    def tanh(self) -> "DeferredLogits":
        if self._cap is not None:
            raise self._refusal("tanh after tanh")
        return self._changed(cap=1.0)

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def view(self, *shape: Any) -> "DeferredLogits":
        """The logits in another shape, which keeps the vocabulary as its last dimension."""
        sizes = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape
        if sizes[-1:] != (self.shape[-1],):
            raise self._refusal(f"view to {sizes}")
        return self._changed(hidden=self.hidden.reshape(*sizes[:-1], self.hidden.shape[-1]))

    reshape = view

    def __add__(self, added: Any) -> "DeferredLogits":
        # A bias: one number per class, added before the logits are scaled or capped.
        plain = self._scale == 1 and self._cap is None and self._added is None
        if not (plain and isinstance(added, Tensor) and added.numel() == added.shape[-1] == self.shape[-1]):
            raise self._refusal("add")
        return self._changed(added=added)

    __radd__ = __add__

    def __getitem__(self, rows: Any) -> "DeferredLogits":
        """Some of the rows: slices and an ellipsis, without a change of the vocabulary."""
        taken = rows if isinstance(rows, tuple) else (rows,)
        slices = all(row is ... or isinstance(row, slice) for row in taken)
        vocabulary = taken[-1] if ... in taken or len(taken) == self.hidden.dim() else ...
        if not slices or vocabulary not in (..., slice(None)):
            raise self._refusal("getitem")
        return self._changed(hidden=self.hidden[rows])

    def __mul__(self, factor: Any) -> "DeferredLogits":
        return self._scaled("*", factor, 1.0)

    __rmul__ = __mul__

    def __truediv__(self, divisor: Any) -> "DeferredLogits":
        return self._scaled("/", divisor, -1.0)

    def _scaled(self, operation: str, number: Any, power: float) -> "DeferredLogits":
        # A tensor may be a parameter, and its value may be on a device; a soft-cap is above zero.
        if not isinstance(number, int | float) or (self._cap is not None and number <= 0):
            what = type(number).__name__ if isinstance(number, Tensor) else repr(number)
            raise self._refusal(f"{operation} {what}")
        scale, cap = self._scale, self._cap
        if cap is None:
            scale *= number**power
        else:
            cap *= number**power
        return self._changed(scale=scale, cap=cap)

    def _changed(
        self,
        hidden: Tensor | None = None,
        scale: float | None = None,
        cap: float | None = None,
        added: Tensor | None = None,
    ) -> "DeferredLogits":
        return DeferredLogits(
            self.hidden if hidden is None else hidden,
            self.layer,
            self.run,
            self._scale if scale is None else scale,
            self._cap if cap is None else cap,
            self._added if added is None else added,
        )

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        own = next(a for a in (*args, *(kwargs or {}).values()) if isinstance(a, cls))
        if func in (torch.tanh, nn.functional.tanh) and len(args) == 1:
            return own.tanh()
        if func is nn.functional.cross_entropy and (asked := Asked.of(*args, **(kwargs or {}))):
            return own.run.cross_entropy(asked)
        raise own._refusal(getattr(func, "__name__", str(func)))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # Python asks whether there is one
            raise AttributeError(name)
        raise self._refusal(name)

    def float(self) -> "DeferredLogits":
        return self

    def _refusal(self, operation: str) -> NotImplementedError:
        return NotImplementedError(
            f"{self.model} needs its logits for {operation!r}, and a patched model has none in training: "
            "unpatch it and use a loss of logits, compute_loss_func(Loss(...), model) or "
            "loss_function(Loss(...), model)"
        )


def _refused(name: str) -> Callable[..., Any]:
    def refuse(self: DeferredLogits, *args: object) -> Any:
        raise self._refusal(name)

    return refuse


# Python looks operators up in the class.
for _name in ("sub", "rsub", "neg", "pow", "matmul", "rtruediv", "setitem", "iter"):
    setattr(DeferredLogits, f"__{_name}__", _refused(_name))
