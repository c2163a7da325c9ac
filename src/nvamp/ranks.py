"""The ranks that share a batch or a vocabulary, seen from one of them.

Nothing here needs `torch.distributed`: `nvamp.distributed` makes `Ranks` from a process group.
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class Ranks(NamedTuple):
    """A set of ranks. By default there is one, and it has everything."""

    rank: int = 0
    size: int = 1
    gather: Callable[[Tensor], Tensor] = lambda x: x[None]  # [k] of every rank -> [size, k]
    total: Callable[[Tensor], Tensor] = lambda x: x  # the sum of x over the ranks
    maximum: Callable[[Tensor], Tensor] = lambda x: x  # the elementwise maximum of x over the ranks


ALONE = Ranks()
