"""Blocks and chunks of a few rows, so that small problems have many of them; and devices one cannot look at."""

import pytest

from nvamp.cross_entropy import chunked


@pytest.fixture(params=[1, 7, 1000])
def rows_at_a_time(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    rows = int(request.param)
    monkeypatch.setattr(chunked, "block_rows", lambda *_: rows)
    monkeypatch.setattr(chunked, "chunk_rows", lambda *_: 2 * rows)
    return rows


@pytest.fixture(params=["CPU", "accelerator"])
def device_kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A CPU as it is, and one treated like a device whose data cannot be looked at without waiting."""
    if request.param == "accelerator":
        monkeypatch.setattr(chunked, "can_look", lambda _: False)
    return str(request.param)
