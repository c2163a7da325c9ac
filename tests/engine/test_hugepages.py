"""Huge pages are asked for, and nothing else changes."""

import ctypes
import mmap
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nvamp.engine import hugepages
from nvamp.engine.hugepages import in_huge_pages


def flags_of_memory(x: Tensor) -> list[str]:
    """The kernel's flags of the mapping in the middle of x."""
    address = x.data_ptr() + x.nbytes // 2
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(bounds[1], 16) <= address < int(bounds[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    raise AssertionError("the memory is not mapped")


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(),
    reason="this system has no huge pages to ask for",
)
def test_large_memory_is_advised() -> None:
    assert "hg" not in flags_of_memory(torch.empty(2**24))
    assert "hg" in flags_of_memory(in_huge_pages(torch.empty(2**24)))


@pytest.mark.parametrize("size", [0, 1, 1000, 2**20, 2**20 + 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_the_tensor_is_as_it_was(size: int, dtype: torch.dtype) -> None:
    fresh = torch.empty(size, dtype=dtype)
    same = in_huge_pages(fresh)
    assert same is fresh
    assert same.fill_(3).eq(3).all()


class Recorder:
    """Takes the place of the C library."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int, int]] = []

    def madvise(self, start: ctypes.c_void_p, length: ctypes.c_size_t, advice: int) -> None:
        self.asked.append((start.value or 0, length.value, advice))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    recorder = Recorder()
    monkeypatch.setattr(hugepages, "_LIBC", recorder)
    return recorder.asked


@pytest.mark.parametrize("offset", [0, 64, 4095])
def test_whole_pages_inside_the_memory_are_asked_for(asked: list[tuple[int, int, int]], offset: int) -> None:
    """The first page may hold other things, too; the last is the allocator's to the end."""
    memory = torch.empty(2**22 + 2 * mmap.PAGESIZE, dtype=torch.uint8)
    offset += -memory.data_ptr() % mmap.PAGESIZE
    x = memory[offset : offset + 2**22]
    in_huge_pages(x)
    start, length, advice = asked.pop()
    assert start % mmap.PAGESIZE == 0
    assert x.data_ptr() <= start < x.data_ptr() + mmap.PAGESIZE
    assert start + length == x.data_ptr() + x.nbytes
    assert advice == mmap.MADV_HUGEPAGE


def test_small_memory_is_left_alone(asked: list[tuple[int, int, int]]) -> None:
    in_huge_pages(torch.empty(2**22 - 1, dtype=torch.uint8))
    assert asked == []


def test_other_devices_are_left_alone(asked: list[tuple[int, int, int]]) -> None:
    x = torch.empty(2**24, device="meta")
    assert in_huge_pages(x) is x
    assert asked == []
