"""`DTensor` arguments of the losses, reduced to the part that a rank has.

This is not in `nvamp.distributed` because PyTorch takes a second to import `DTensor`.
"""

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from nvamp.distributed import Group, map_gradient


def local_logits(
    logits: Tensor, labels: Tensor, vocab_group: Group | None
) -> tuple[Tensor, Tensor, Group | None]:
    """The logits and labels of this rank, and the group over which the vocabulary is sharded, if it is."""
    if isinstance(labels, DTensor):
        labels = _replicated("labels", labels)
    if not isinstance(logits, DTensor):
        return logits, labels, vocab_group
    if vocab_group is not None:
        raise ValueError("vocab_group must be None if logits are a DTensor, which has its own mesh")
    return logits.to_local(), labels, group_of_shards("logits", logits, logits.ndim - 1)


def local_head(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, vocab_group: Group | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Group | None]:
    """The same for the linear path: plain tensors in place of DTensors, and the group of the vocabulary.

    A rank keeps its part of the weight if the hidden states are replicated DTensors, or if `vocab_group` says
    that they are the same on all its ranks. Otherwise every rank has its own hidden states, as under FSDP,
    and the weight is gathered: one all-gather, and one reduce-scatter of its gradient, which is the mean over
    the ranks.
    """
    if isinstance(labels, DTensor):
        labels = _replicated("labels", labels)
    if isinstance(hidden, DTensor):
        if vocab_group is not None:
            raise ValueError("vocab_group must be None if hidden is a DTensor, which has its own mesh")
        if not isinstance(weight, DTensor):
            raise TypeError("weight must be a DTensor if hidden is one, got a plain tensor")
        hidden, vocab_group = _replicated("hidden", hidden), group_of_shards("weight", weight, 0)
    elif vocab_group is None:
        return hidden, _gathered(weight), labels, None if bias is None else _gathered(bias), None
    return hidden, _part("weight", weight), labels, None if bias is None else _part("bias", bias), vocab_group


def _part(name: str, x: Tensor) -> Tensor:
    if not isinstance(x, DTensor):
        return x
    group_of_shards(name, x, 0)
    return x.to_local()


def _gathered(x: Tensor) -> Tensor:
    if not isinstance(x, DTensor):
        return x
    mesh = x.device_mesh
    whole = x.full_tensor(grad_placements=[Partial() for _ in range(mesh.ndim)])
    return map_gradient(whole, lambda grad: grad / mesh.size())


def _replicated(name: str, x: DTensor) -> Tensor:
    if not all(placement.is_replicate() for placement in x.placements):
        raise ValueError(f"{name} must be replicated, got {_names(x.placements)}")
    return x.to_local()


def group_of_shards(name: str, x: DTensor, vocab_dim: int) -> dist.ProcessGroup | None:
    """The group of the one mesh dimension over which `vocab_dim` of x is sharded; None if there is none."""
    group = None
    for dim, placement in enumerate(x.placements):
        if isinstance(placement, Replicate):
            continue
        if not isinstance(placement, Shard) or placement.dim != vocab_dim or group is not None:
            raise ValueError(
                f"{name} must be replicated, or Shard({vocab_dim}) over one dimension of the mesh, "
                f"got {_names(x.placements)}"
            )
        group = x.device_mesh.get_group(dim)
    return group


def _names(placements: tuple[Placement, ...]) -> str:
    return ", ".join(map(repr, placements))
