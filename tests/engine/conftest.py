"""Blocks and chunks of a few rows, so that small problems have many of them; and devices one cannot look at."""

from collections.abc import Iterator
from typing import Any

import numpy
import pytest
import torch
from triton.runtime import interpreter

from nvamp.engine import chunked, devices, linear, triton


@pytest.fixture
def rounding_to_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the interpreter of kernels round to bfloat16 as every GPU does, where it would truncate."""
    convert = interpreter._convert_float

    def rounded(x: Any, source: Any, target: Any, mode: Any) -> Any:
        if target.name == "bf16":
            return torch.from_numpy(x).bfloat16().view(torch.int16).numpy().view(numpy.uint16)
        return convert(x, source, target, mode)

    monkeypatch.setattr(interpreter, "_convert_float", rounded)


@pytest.fixture
def unwritten_is_nan() -> Iterator[None]:
    """Has PyTorch fill new memory with NaN, so that a result shows if it was not written to."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=[1, 7, 1000])
def rows_at_a_time(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    return at_a_time(request.param, monkeypatch)


@pytest.fixture(params=["CPU", "accelerator", "recorded"])
def device_kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A CPU; one taken for a device whose data one has to wait for; one where waiting is impossible."""
    return _take_for(request.param, monkeypatch)


@pytest.fixture(params=["CPU, 1", "CPU, 7", "CPU, 1000", "accelerator, 7", "recorded, 7"])
def setting(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kind of device, and how many rows at a time."""
    kind, rows = request.param.split(", ")
    _take_for(kind, monkeypatch)
    at_a_time(int(rows), monkeypatch)


def _take_for(kind: str, monkeypatch: pytest.MonkeyPatch) -> str:
    if kind != "CPU":
        monkeypatch.setattr(devices, "can_look", lambda _: False)
    if kind == "recorded":
        monkeypatch.setattr(devices, "can_wait", lambda _: False)
    return kind


def at_a_time(rows: int, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(chunked, "block_rows", lambda *_: rows)
    monkeypatch.setattr(linear, "chunk_rows", lambda *_: 2 * rows)
    monkeypatch.setattr(linear, "SUMMANDS", 16)
    if rows < 1000:  # kernels take blocks of columns
        monkeypatch.setattr(triton, "WARP", 2)  # and several lanes
        monkeypatch.setattr(triton, "reading", lambda *_, **__: triton.Launch(16, 1))
        monkeypatch.setattr(triton, "streaming", lambda *_, **__: triton.Launch(16, 1))
        monkeypatch.setattr(triton, "revisiting", lambda *_, **__: triton.Launch(32, 1))
    return rows
