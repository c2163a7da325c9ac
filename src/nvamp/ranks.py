"""The ranks that share a batch or a vocabulary, as one of them sees the others.

Nothing here knows `torch.distributed`: `nvamp.distributed` makes `Ranks` of a process group.
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class Ranks(NamedTuple):
    """Some ranks. By default there is one, and it has everything."""

    rank: int = 0
    size: int = 1
    gather: Callable[[Tensor], Tensor] = lambda x: x[None]  # [k] of every rank -> [size, k]
    total: Callable[[Tensor], Tensor] = lambda x: x  # the sum of x over the ranks
    maximum: Callable[[Tensor], Tensor] = lambda x: x  # the elementwise maximum of x over the ranks


ALONE = Ranks()
