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


class Weights(NamedTuple):
    """The weight [V, D] and the bias [V] of a product."""

    weight: Tensor
    bias: Tensor | None


class Product(NamedTuple):
    """A part of logits that is not computed: scale·(hidden @ weightᵀ + bias)."""

    hidden: Tensor  # [..., D]
    layer: nn.Linear | Weights  # the loss reads the weight of a layer when it is computed
    scale: float = 1.0


class DeferredLogits:
    """The logits of an output layer, not computed: x or `cap·tanh(x)`, x a sum of products and a bias.

    Models scale, soft-cap and cast their logits before the loss, and some add a bias; these operations are
    recorded and become the loss's `logit_scale`, `softcap` and bias. Adapters of the layer add products.
    Models that compute their loss themselves take rows and flatten; `torch.nn.functional.cross_entropy` of
    the result is the criterion's loss. Anything else raises a `NotImplementedError` that names it.

    Attributes:
        products: the first is the one of the layer itself.
        run: the forward to which they belong.
        added: [V], what the model adds to its logits before it scales them, as a bias of the first product.
    """

    def __init__(
        self,
        products: tuple[Product, ...],
        run: Run,
        cap: float | None = None,
        added: Tensor | None = None,
    ) -> None:
        self.products = products
        self.run = run
        self.added = added
        self._cap = cap

    @property
    def model(self) -> str:
        return self.run.model

    @property
    def options(self) -> dict[str, float]:
        """The options with which a loss of x over the scale of its first product is that of the logits."""
        scale = self.products[0].scale
        if self._cap is not None:
            return {"softcap": self._cap, "logit_scale": scale * self._cap}
        return {} if scale == 1 else {"logit_scale": scale}

    @property
    def shape(self) -> torch.Size:
        hidden, layer, _ = self.products[0]
        return torch.Size((*hidden.shape[:-1], len(layer.weight)))

    @property
    def dtype(self) -> torch.dtype:
        return self.products[0].layer.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.products[0].hidden.device

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def to(self, *args: Any, **kwargs: Any) -> "DeferredLogits":
        """Itself: the loss is computed in at least float32, on the device of the hidden states."""
        return self

    def contiguous(self) -> "DeferredLogits":
        return self

    def clone(self) -> "DeferredLogits":
        return self

    def tanh(self) -> "DeferredLogits":
        if self._cap is not None:
            raise self._refusal("tanh after tanh")
        return DeferredLogits(self.products, self.run, 1.0, self.added)

    def view(self, *shape: Any) -> "DeferredLogits":
        """The logits in another shape, which keeps the vocabulary as its last dimension."""
        sizes = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape
        if sizes[-1:] != (self.shape[-1],):
            raise self._refusal(f"view to {sizes}")
        return self._of_rows(lambda hidden: hidden.reshape(*sizes[:-1], hidden.shape[-1]))

    reshape = view

    def __getitem__(self, rows: Any) -> "DeferredLogits":
        """Some of the rows: slices and an ellipsis, without a change of the vocabulary."""
        taken = rows if isinstance(rows, tuple) else (rows,)
        slices = all(row is ... or isinstance(row, slice) for row in taken)
        vocabulary = taken[-1] if ... in taken or len(taken) == len(self.shape) else ...
        if not slices or vocabulary not in (..., slice(None)):
            raise self._refusal("getitem")
        return self._of_rows(lambda hidden: hidden[rows])

    def _of_rows(self, change: Callable[[Tensor], Tensor]) -> "DeferredLogits":
        products = tuple(p._replace(hidden=change(p.hidden)) for p in self.products)
        return DeferredLogits(products, self.run, self._cap, self.added)

    @property
    def _is_sum(self) -> bool:
        """Whether they are a sum of products and no more."""
        return self._cap is None and self.added is None

    def __add__(self, other: Any) -> "DeferredLogits":
        if isinstance(other, DeferredLogits) and self._is_sum and other._is_sum:
            return DeferredLogits((*self.products, *other.products), self.run)
        # A bias: one number per class, added before the logits are scaled or capped.
        plain = self._is_sum and self.products[0].scale == 1
        if not (plain and isinstance(other, Tensor) and other.numel() == other.shape[-1] == self.shape[-1]):
            raise self._refusal("add")
        return DeferredLogits(self.products, self.run, added=other.flatten())

    __radd__ = __add__

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
        factor = number**power
        if self._cap is not None:
            return DeferredLogits(self.products, self.run, self._cap * factor, self.added)
        products = tuple(p._replace(scale=p.scale * factor) for p in self.products)
        return DeferredLogits(products, self.run, added=self.added)

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
