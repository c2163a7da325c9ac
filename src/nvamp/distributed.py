"""A batch on several ranks: statistics of all of it, exchanged with PyTorch's own collectives."""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from nvamp.objective import Ranks

Group = dist.ProcessGroup | DeviceMesh


def ranks_of(group: Group) -> Ranks:
    """The ranks of a process group, or of a device mesh of one dimension.

    Collectives of `objective.statistics` on it: forward two all-reduces, of 4·size and of 3 numbers; backward
    none. They do not wait for the device.
    """
    process_group = group.get_group() if isinstance(group, DeviceMesh) else group
    rank, size = dist.get_rank(process_group), dist.get_world_size(process_group)

    def total(x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x, group=process_group)
        return x

    def gather(x: Tensor) -> Tensor:
        mine = torch.arange(size, device=x.device) == rank
        return total(torch.where(mine[:, None], x, 0))

    return Ranks(rank, size, gather, total)


def abandon(ranks: Ranks, dtype: torch.dtype, device: torch.device) -> None:
    """Takes part in the collectives of `objective.statistics` with NaN: the others get a loss of NaN.

    For a rank that is about to raise an error: who waits for it would wait for ever.
    """
    ranks.gather(torch.full((4,), torch.nan, dtype=dtype, device=device))
    ranks.total(torch.full((3,), torch.nan, dtype=dtype, device=device))


def check_group(group: object) -> None:
    """Raises unless statistics can be taken over it."""
    if isinstance(group, dist.ProcessGroup):
        return
    if not isinstance(group, DeviceMesh):
        raise TypeError(f"process_group must be a ProcessGroup or a DeviceMesh, got {type(group).__name__}")
    if group.ndim != 1:
        raise ValueError(
            f"process_group must be a DeviceMesh of one dimension, got {group.ndim} "
            f"{group.mesh_dim_names or ''}: take one, mesh['name'], or flatten them"
        )
