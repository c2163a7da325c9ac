"""A stand-in for the logits of a patched model: it knows how they would be computed, and does not do it."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

# The first operation of a model that computes the cross-entropy of its logits itself.
_OF_ITS_OWN_LOSS = frozenset(
    ("view", "reshape", "flatten", "getitem", "transpose", "permute", "log_softmax", "cross_entropy")
)


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
    """The logits of an output layer, not computed: x or `cap·tanh(x)`, x a sum of products.

    Models scale, soft-cap and cast their logits before the loss; these operations are recorded and become the
    loss's `logit_scale` and `softcap`. Adapters of the layer add products. Any other operation raises a
    `NotImplementedError` that names it.

    Attributes:
        products: the first is the one of the layer itself.
        model: the name of the model's class, for errors.
    """

    def __init__(self, products: tuple[Product, ...], model: str, cap: float | None = None) -> None:
        self.products = products
        self.model = model
        self._cap = cap

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
        return DeferredLogits(self.products, self.model, 1.0)

    def __add__(self, other: Any) -> "DeferredLogits":
        if not isinstance(other, DeferredLogits) or self._cap is not None or other._cap is not None:
            raise self._refusal("add")
        return DeferredLogits((*self.products, *other.products), self.model)

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
            return DeferredLogits(self.products, self.model, self._cap * factor)
        products = tuple(p._replace(scale=p.scale * factor) for p in self.products)
        return DeferredLogits(products, self.model)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> "DeferredLogits":
        own = next(a for a in (*args, *(kwargs or {}).values()) if isinstance(a, cls))
        if func in (torch.tanh, nn.functional.tanh) and len(args) == 1:
            return own.tanh()
        raise own._refusal(getattr(func, "__name__", str(func)))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # Python asks whether there is one
            raise AttributeError(name)
        raise self._refusal(name)

    def float(self) -> "DeferredLogits":
        return self

    def _refusal(self, operation: str) -> NotImplementedError:
        ways = "compute_loss_func(Loss(...))"
        if operation in _OF_ITS_OWN_LOSS:
            ways += "; a model that computes its cross-entropy itself ignores model.loss_function"
        else:
            ways += " or loss_function(Loss(...))"
        return NotImplementedError(
            f"{self.model} needs its logits for {operation!r}, and a patched model has none in training: "
            f"unpatch it and use a loss of logits, {ways}"
        )


def _refused(name: str) -> Callable[..., Any]:
    def refuse(self: DeferredLogits, *args: object) -> Any:
        raise self._refusal(name)

    return refuse


# Python looks operators up in the class.
for _name in ("radd", "sub", "rsub", "neg", "pow", "matmul", "rtruediv", "getitem", "setitem", "iter"):
    setattr(DeferredLogits, f"__{_name}__", _refused(_name))
