"""`DTensor` arguments of the losses, reduced to the part that a rank has.

One dimension of the mesh may shard the vocabulary, and another one the batch, the first dimension of the
labels. This is not in `nvamp.distributed` because PyTorch takes a second to import `DTensor`.
"""

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from nvamp.distributed import Group, map_gradient


def local_logits(
    logits: Tensor, labels: Tensor, vocab_group: Group | None
) -> tuple[Tensor, Tensor, Group | None, Group | None]:
    """The logits and labels of this rank, and the groups that share the vocabulary and the batch, or None."""
    if not isinstance(logits, DTensor):
        return logits, _replicated("labels", labels), vocab_group, None
    if vocab_group is not None:
        raise ValueError("vocab_group must be None if logits are a DTensor, which has its own mesh")
    of_vocab, of_batch = _sharded_dims("logits", logits, logits.ndim - 1, 0)
    labels = _local_labels(labels, logits, "logits", of_batch)
    return logits.to_local(), labels, _group(logits, of_vocab), _group(logits, of_batch)


def local_head(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, vocab_group: Group | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Group | None, Group | None]:
    """The same for the linear path: plain tensors in place of DTensors, and both groups.

    A rank keeps its part of the weight if the hidden states are DTensors, or if `vocab_group` says that they
    are the same on all its ranks. Otherwise every rank has its own hidden states, as under FSDP, and the
    weight is gathered: one all-gather, and one reduce-scatter of its gradient, which is the mean over the
    ranks.
    """
    if not isinstance(hidden, DTensor):
        labels = _replicated("labels", labels)
        of_head = _gathered if vocab_group is None else _part
        bias = None if bias is None else of_head("bias", bias)
        return hidden, of_head("weight", weight), labels, bias, vocab_group, None
    if vocab_group is not None:
        raise ValueError("vocab_group must be None if hidden is a DTensor, which has its own mesh")
    if not isinstance(weight, DTensor):
        raise TypeError("weight must be a DTensor if hidden is one, got a plain tensor")
    of_vocab, _ = _sharded_dims("weight", weight, 0)
    _, of_batch = _sharded_dims("hidden", hidden, None, 0)
    if of_batch is not None and (of_batch == of_vocab or weight.device_mesh != hidden.device_mesh):
        raise ValueError(
            f"weight must be on the mesh of hidden and replicated where that is sharded, got "
            f"{_names(weight.placements)} for hidden {_names(hidden.placements)}"
        )
    labels = _local_labels(labels, hidden, "hidden", of_batch)
    bias = None if bias is None else _part("bias", bias, of_batch)
    groups = _group(weight, of_vocab), _group(hidden, of_batch)
    return hidden.to_local(), _part("weight", weight, of_batch), labels, bias, *groups


def _local_labels(labels: Tensor, x: DTensor, name: str, of_batch: int | None) -> Tensor:
    """The labels of this rank's rows of x. Plain labels could be those of all rows or of this rank's."""
    if of_batch is None:
        return _replicated("labels", labels)
    if not isinstance(labels, DTensor):
        raise TypeError(f"labels must be a DTensor, sharded as {name} over the batch, got a plain tensor")
    wanted = tuple(Shard(0) if dim == of_batch else Replicate() for dim in range(x.device_mesh.ndim))
    if labels.placements != wanted or labels.device_mesh != x.device_mesh:
        raise ValueError(
            f"labels must be {_names(wanted)} on the mesh of {name}, got {_names(labels.placements)}"
        )
    return labels.to_local()


def _part(name: str, x: Tensor, of_batch: int | None = None) -> Tensor:
    """This rank's part of a weight or bias. Each part of the batch adds to its gradient."""
    if not isinstance(x, DTensor):
        return x
    _sharded_dims(name, x, 0)
    return x.to_local(grad_placements=[Partial() if i == of_batch else p for i, p in enumerate(x.placements)])


def _gathered(name: str, x: Tensor) -> Tensor:
    if not isinstance(x, DTensor):
        return x
    mesh = x.device_mesh
    whole = x.full_tensor(grad_placements=[Partial() for _ in range(mesh.ndim)])
    return map_gradient(whole, lambda grad: grad / mesh.size())


def _replicated(name: str, x: Tensor) -> Tensor:
    if not isinstance(x, DTensor):
        return x
    if not all(placement.is_replicate() for placement in x.placements):
        raise ValueError(f"{name} must be replicated, got {_names(x.placements)}")
    return x.to_local()


def _sharded_dims(
    name: str, x: DTensor, vocab_dim: int | None, batch_dim: int | None = None
) -> tuple[int | None, int | None]:
    """The dimensions of the mesh that shard these two of x; None for one that is not sharded."""
    possible = [dim for dim in (vocab_dim, batch_dim) if dim is not None]
    found: dict[int | None, int] = {}
    for mesh_dim, placement in enumerate(x.placements):
        if isinstance(placement, Replicate):
            continue
        dim = placement.dim if isinstance(placement, Shard) else None
        if dim not in possible or dim in found:
            shards = " and ".join(f"Shard({dim})" for dim in possible)
            raise ValueError(
                f"{name} must be replicated, or {shards} over one dimension of the mesh each, "
                f"got {_names(x.placements)}"
            )
        found[dim] = mesh_dim
    return found.get(vocab_dim), found.get(batch_dim)


def group_of_shards(name: str, x: DTensor, vocab_dim: int) -> dist.ProcessGroup | None:
    """The group over which `vocab_dim` of x is sharded; None if it is not."""
    return _group(x, _sharded_dims(name, x, vocab_dim)[0])


def _group(x: DTensor, mesh_dim: int | None) -> dist.ProcessGroup | None:
    return None if mesh_dim is None else x.device_mesh.get_group(mesh_dim)


def _names(placements: tuple[Placement, ...]) -> str:
    return ", ".join(map(repr, placements))
