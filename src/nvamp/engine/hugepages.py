"""Large CPU buffers in huge pages, as NumPy has its large arrays.

Writing to fresh memory costs one page fault per page. For a gradient of 250 MiB in pages of 4 KiB that took
longer than the arithmetic (`python -m benchmarks.cpu --only hugepages` measures it); in pages of 2 MiB it
all but vanishes. Linux grants huge pages on request if it is set to `madvise`, a common default.
"""

import ctypes
import mmap
import sys

from torch import Tensor

_WORTHWHILE = 4 * 2**20  # bytes
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def in_huge_pages(fresh: Tensor) -> Tensor:
    """Asks for huge pages for `fresh`, a tensor not yet written to, on a CPU under Linux; returns it.

    If the system declines, nothing changes.
    """
    if _LIBC is not None and fresh.device.type == "cpu" and fresh.nbytes >= _WORTHWHILE:
        start = -(-fresh.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        length = fresh.data_ptr() + fresh.nbytes - start
        _LIBC.madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_HUGEPAGE)
    return fresh
