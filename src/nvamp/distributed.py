"""The exchange between ranks that share a batch or a vocabulary, with PyTorch's own collectives."""

from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from nvamp.ranks import Exchange, Ranks, Term

Group = dist.ProcessGroup | DeviceMesh


def ranks_of(group: Group) -> Ranks:
    """The ranks of a process group, or of a device mesh of one dimension.

    Each function of the result is one all-reduce, which does not wait for the device. `objectives.statistics`
    takes two in the forward and none in the backward.
    """
    process_group = group.get_group() if isinstance(group, DeviceMesh) else group
    rank, size = dist.get_rank(process_group), dist.get_world_size(process_group)

    def all_reduce(x: Tensor, op: dist.ReduceOp.RedOpType) -> Tensor:
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x, op, group=process_group)
        return x

    def total(x: Tensor) -> Tensor:
        return all_reduce(x, dist.ReduceOp.SUM)

    def gather(x: Tensor) -> Tensor:
        mine = torch.arange(size, device=x.device) == rank
        return total(torch.where(mine[:, None], x, 0))

    return Ranks(rank, size, gather, total, lambda x: all_reduce(x, dist.ReduceOp.MAX))


class _Calls:
    """What a process has called with a group."""

    def __init__(self) -> None:
        self.number = 0
        self.kinds: set[object] = set()


_CALLS: WeakKeyDictionary[dist.ProcessGroup, _Calls] = WeakKeyDictionary()


def exchange_of(group: Group, terms: Mapping[str, Term], kind: object) -> Exchange:
    """The exchange of one call of a loss among a group. It counts the call, except under `torch.compile`.

    The first of its `kind` looks at the terms of other ranks even if that waits for the device.
    """
    ranks = ranks_of(group)
    if torch.compiler.is_compiling():
        return Exchange(ranks, terms)
    calls = _CALLS.setdefault(group.get_group() if isinstance(group, DeviceMesh) else group, _Calls())
    calls.number += 1
    first = kind not in calls.kinds
    calls.kinds.add(kind)
    return Exchange(ranks, {**terms, "the number of the call": calls.number}, first)


def check_group(name: str, group: object) -> None:
    """Raises unless the argument `name` is a group of ranks."""
    if isinstance(group, dist.ProcessGroup):
        return
    if not isinstance(group, DeviceMesh):
        raise TypeError(f"{name} must be a ProcessGroup or a DeviceMesh, got {type(group).__name__}")
    if group.ndim != 1:
        raise ValueError(
            f"{name} must be a DeviceMesh of one dimension, got {group.ndim} "
            f"{group.mesh_dim_names or ''}: take one, mesh['name'], or flatten them"
        )


def map_gradient(x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """x, with function(gradient) in place of its gradient."""
    result: Tensor = _MapGradient.apply(x, function)  # type: ignore[no-untyped-call]
    return result


class _MapGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.function = function
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.function(grad), None
