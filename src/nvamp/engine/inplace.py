"""The conditions under which a backward may work in place, on logits or on what its own forward saved."""

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

from nvamp.engine.operator import is_ordinary


def may_use_up(saved: Tensor, *grads: Tensor | None) -> bool:
    """Whether a backward that receives `grads` may overwrite what its forward saved.

    It may not if it is compiled, keeps the graph, handles a batch of gradients or is itself differentiated.
    """
    if type(saved) is not Tensor or not is_ordinary(saved):
        return False
    if any(not is_ordinary(x) or is_functorch_wrapped_tensor(x) for x in grads if x is not None):
        return False
    return not _graph_is_kept() and not torch.is_grad_enabled()


def saving_is_hooked() -> bool:
    """Whether saved tensors now go through hooks, as under checkpointing, which leaves them unprotected.

    Autograd detects changes only in tensors that it saved itself.
    """
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def _graph_is_kept() -> bool:
    """Whether the running backward has `retain_graph=True`; True if PyTorch does not report it."""
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if ask is None else bool(ask())


def is_of_leaf(x: Tensor) -> bool:
    """Whether x is a leaf, such as a parameter, or a view of one."""
    return x.is_leaf or (x._base is not None and x._base.is_leaf)


def no_overlap(x: Tensor) -> bool:
    """Whether no two elements of x share memory, as those of an expanded tensor do."""
    extent = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1 and stride < extent:
            return False
        extent = max(extent, stride * size)
    return True
