"""The output layers that the linear path serves: what each computes, as a sum of products."""

import sys
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

from nvamp.engine.parts import has_dtensors
from nvamp.integrations.transformers.deferred import DeferredLogits, Product, Run, Weights

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

    from nvamp.distributed import Group

# Layers of PEFT that add products to the one of the layer they wrap, or change rows of its weight.
_ADAPTERS = (
    ("peft.tuners.lora.layer", "Linear"),
    ("peft.tuners.lora.bnb", "Linear4bit"),
    ("peft.tuners.trainable_tokens.layer", "TrainableTokensLayer"),
    ("peft.utils.other", "TrainableTokensWrapper"),
)


def layers_of(model: Any) -> list[Any]:
    """The modules that may compute logits: several if PEFT has an adapter or a copy of the output layer."""
    layer = model.get_output_embeddings()
    if hasattr(layer, "modules_to_save"):
        return [layer.original_module, *layer.modules_to_save.values()]
    return [layer, base_of(layer)] if _is_adapted(layer) else [layer]


def deferred(layer: Any, forward: Any, hidden: Tensor, run: Run) -> DeferredLogits:
    """The logits of an output layer that has the given forward, not computed."""
    if isinstance(layer, nn.Linear):
        return DeferredLogits((_of_4bit(layer, hidden) if _is_4bit(layer) else Product(hidden, layer),), run)
    with _Recorded(run, base_of(layer).out_features):
        logits: DeferredLogits = forward(layer, hidden)
    return logits


def _of_4bit(layer: Any, hidden: Tensor) -> Product:
    """The product that bitsandbytes computes from a weight of four bits: with the weight written out."""
    from bitsandbytes.functional import dequantize_4bit

    if not layer.compute_type_is_set:
        layer.set_compute_type(hidden)
        layer.compute_type_is_set = True
    hidden = hidden if layer.compute_dtype is None else hidden.to(layer.compute_dtype)
    weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state).to(hidden.dtype)
    return Product(hidden, Weights(weight, None if layer.bias is None else layer.bias.to(hidden.dtype)))


class _Recorded(TorchFunctionMode):
    """Products with a weight of all classes are recorded and not computed."""

    def __init__(self, run: Run, vocab: int) -> None:
        super().__init__()
        self.run = run
        self.vocab = vocab

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is linear:
            hidden, weights = _arguments(*args, **(kwargs or {}))
            if isinstance(hidden, Tensor) and len(weights.weight) == self.vocab:
                return DeferredLogits((Product(hidden, weights),), self.run)
        return func(*args, **(kwargs or {}))


def _arguments(input: Any, weight: Tensor, bias: Tensor | None = None) -> tuple[Any, Weights]:
    """Those of `torch.nn.functional.linear`, under its names."""
    return input, Weights(weight, bias)


class HeadOfLoss(NamedTuple):
    """What a loss computes logits from, without their scale: hidden @ weightᵀ + bias."""

    hidden: Tensor  # [..., D]
    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    vocab_group: "Group | None" = None  # the ranks that share the vocabulary, if the hidden states do not say


def head_of(logits: DeferredLogits) -> HeadOfLoss:
    """One product that is these logits without their scale.

    A sum of products is one product: that of the hidden states side by side and the weights side by side.
    Nothing is added to the weight of a half-precision layer, where a small update would be lost.
    """
    first, *others = logits.products
    if not others:
        hidden, layer, _ = first
        bias = layer.bias
        if logits.added is not None:
            bias = _sum_of([logits.added] if bias is None else [bias, logits.added], layer.weight)
        return HeadOfLoss(hidden, layer.weight, bias, None if has_dtensors(hidden) else _ranks_of(layer))
    weights = [p.layer.weight for p in logits.products]
    if has_dtensors(*weights):
        raise NotImplementedError(
            f"{logits.model} has an adapter on an output layer that is in parts on several ranks: under FSDP "
            "leave the layer in the root's unit, as fully_shard(model) does; a tp_plan excludes the adapter"
        )
    dtype = first.layer.weight.dtype
    scaled = [(p, p.scale / first.scale) for p in logits.products]
    biases = [p.layer.bias * scale for p, scale in scaled if p.layer.bias is not None]
    bias = _sum_of(biases if logits.added is None else [*biases, logits.added], first.layer.weight)
    parts = [(p.hidden * scale).to(dtype) for p, scale in scaled]
    return HeadOfLoss(torch.cat(parts, -1), torch.cat([w.to(dtype) for w in weights], 1), bias)


def _sum_of(biases: list[Tensor], weight: Tensor) -> Tensor | None:
    """Their sum [V], in the dtype and on the device of the weight; None if there is none."""
    return torch.stack([bias.to(weight) for bias in biases]).sum(0) if biases else None


def _ranks_of(layer: Any) -> "Group | None":
    """The ranks over which transformers' tensor parallelism has split the classes of the layer."""
    if not isinstance(layer, nn.Linear) or "_nvamp_forward" not in vars(layer):
        return None
    from nvamp.dtensors import group_of_shards

    return group_of_shards("weight", cast("DTensor", layer.weight), 0)


def base_of(layer: Any) -> nn.Linear:
    """The linear layer of the model itself, which adapters wrap."""
    return next(module for module in layer.modules() if isinstance(module, nn.Linear))


def check_layer(layer: Any, model: str) -> None:
    """Raises a `TypeError` unless `deferred` can be made of the layer."""
    if (found := _what_is_wrong(layer)) is not None:
        raise TypeError(
            f"the output layer of {model} must be a plain torch.nn.Linear, one in 4 bits of bitsandbytes, or "
            f"either with PEFT's LoRA or trainable tokens, got {found}: use a loss of logits, "
            "compute_loss_func(Loss(...), model) or loss_function(Loss(...), model)"
        )


def check_vocab_group(layer: Any, vocab_group: object) -> None:
    """Raises a `ValueError` if a criterion has a `vocab_group` and the layer too is split over ranks."""
    if vocab_group is not None and (_is_split(layer) or "_nvamp_forward" in vars(layer)):
        raise ValueError(
            "vocab_group must be None for a model with a tp_plan, which says itself which ranks share the "
            "vocabulary"
        )


def _what_is_wrong(layer: Any) -> str | None:
    """What the layer is that `deferred` cannot be made of; None if it can."""
    name = _name_of(layer)
    if _is_adapted(layer):
        if variants := getattr(layer, "lora_variant", None):  # such as DoRA
            return f"{name} with {', '.join(type(variant).__name__ for variant in variants.values())}"
        return None  # and `layers_of` has the layer that it wraps
    if _is_4bit(layer):
        return None
    # PEFT may have wrapped a layer that was patched before.
    if getattr(getattr(layer, "_nvamp_unpatched", type(layer)), "forward", None) is not nn.Linear.forward:
        return name
    if "forward" in vars(layer) and not _is_split(layer):
        replaced = vars(layer).get("_hf_hook", vars(layer)["forward"])  # Accelerate's, or somebody's
        by = getattr(replaced, "__qualname__", _name_of(replaced))
        return f"{name} whose forward has been replaced by {by}"
    if type(layer.weight) not in (Tensor, nn.Parameter) and not has_dtensors(layer.weight):
        return f"{name} whose weight is a {_name_of(layer.weight)}"
    return None


def _is_adapted(layer: Any) -> bool:
    """Whether PEFT has put an adapter on the layer that leaves its logits a sum of products."""
    return _is_one_of(layer, _ADAPTERS)


def _is_4bit(layer: Any) -> bool:
    return _is_one_of(layer, (("bitsandbytes.nn.modules", "Linear4bit"),))


def _is_split(layer: Any) -> bool:
    """Whether transformers' tensor parallelism has split the layer over ranks."""
    return getattr(layer, "_is_hooked", False) and has_dtensors(layer.weight)


def _is_one_of(layer: Any, classes: tuple[tuple[str, str], ...]) -> bool:
    """Whether the layer is of one of the classes (module, name), without importing their modules."""
    kinds = (getattr(sys.modules.get(module), name, None) for module, name in classes)
    return isinstance(layer, tuple(kind for kind in kinds if kind is not None))


def _name_of(x: object) -> str:
    return f"{type(x).__module__}.{type(x).__qualname__}"
