"""What of the GPU's benchmark a CPU can tell: the parts run, and say so where something is wrong."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import gpu
from benchmarks.measure import Timing
from tests.study.conftest import one_thread

__all__ = ["one_thread"]

CPU = torch.device("cpu")
METER = gpu.Meter(CPU, rounds=1, repeats=1)
CONTENDERS = {"nvamp: cross-entropy", "nvamp: scalar", "nvamp: token", "original NVAMP"}


@pytest.mark.parametrize(
    "build",
    [
        lambda: gpu.logits_path(METER, 8, 64, 1e9, peers=False),
        lambda: gpu.linear_path(METER, 8, 4, 64, peers=False),
    ],
    ids=["logits", "linear"],
)
def test_timed_parts(build: Any) -> None:
    part = build()
    part.show()
    record = json.loads(json.dumps(part.as_json()))
    assert record["ratios"].keys() >= CONTENDERS
    assert record["ratios"][part.baseline] == 1
    assert record["not_run"] == {}
    assert len(record["bars"]) >= 3
    assert all(math.isfinite(bar["measured"]) for bar in record["bars"])


def test_a_contender_that_does_not_run_says_why(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    peers = gpu.linear_peers(*(torch.ones(2, 2),) * 3)

    def full() -> None:
        raise torch.OutOfMemoryError("out of [memory]")

    makers = {"ours": lambda: lambda: None, "full": lambda: full, "missing": peers["Liger, float32 sum"]}
    part = gpu.compete(METER, "", "ours", makers)
    part.show()
    assert list(part.timings) == list(part.extra_bytes) == ["ours"]
    assert part.not_run["full"] == "OutOfMemoryError: out of [memory]"
    assert part.not_run["missing"].startswith("ModuleNotFoundError")
    assert capsys.readouterr().out.count("not run") == 2
    assert not part.failed
    makers = {"ours": lambda: lambda: None, "nvamp: scalar": lambda: full}
    assert gpu.compete(METER, "", "ours", makers).failed


def test_bars_compare_like_with_like() -> None:
    seconds = {
        gpu.THREE: 1.0,
        gpu.FOUR: 2.0,
        gpu.FILTERED: 0.1,
        "Liger, float32 sum": 1.5,
        "Liger, bfloat16 sum": 1.2,
    }
    seconds |= {
        "nvamp: scalar": 1.2,
        "nvamp: token": 2.5,
        "nvamp: cross-entropy": 1.2,
        "nvamp: scalar, bfloat16 sum": 1.0,
    }
    memory = {
        "Liger, float32 sum": 8,
        "Liger, bfloat16 sum": 4,
        "nvamp: scalar": 4,
        "nvamp: scalar, bfloat16 sum": 3,
    }
    timings = {name: Timing(s, s, s, 1) for name, s in seconds.items()}
    part = gpu.Part("", gpu.THREE, timings, memory)
    gpu.add_linear_bars(part)
    assert [bar.measured for bar in part.bars] == [1.2, 1.25, 1.0, 1.0, 0.5, 0.75]
    assert part.bars[2].what == "nvamp: scalar, over Liger, bfloat16 sum, the fastest peer"


def test_correctness() -> None:
    part = gpu.correctness(CPU, [(40, 8, 65), (70, 8, 130)], (50, 70))
    assert part.not_run == {}
    assert all(math.isfinite(bar.measured) for bar in part.bars)
    exact = [bar for bar in part.bars if "inplace" in bar.what or "torch.compile" in bar.what]
    assert exact
    assert all(bar.met for bar in exact)


def test_a_wrong_result_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(x: Tensor, y: Tensor, **options: Any) -> Tensor:
        return 1.01 * F.cross_entropy(x, y, reduction="none")

    args = ("", CPU, torch.float32, (40, 8, 65), "chunked")
    right = list(gpu.accuracy(*args))
    monkeypatch.setattr(gpu, "token_nll", wrong)
    bars = list(gpu.accuracy(*args))
    for bar, before in zip(bars, right, strict=True):
        assert (bar.measured > 100 * before.measured) == (", logits, " in bar.what and "part" not in bar.what)


def test_what_breaks_off_is_recorded_and_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu, "COPIED", 64)
    monkeypatch.setattr(gpu, "SQUARE", 4)

    def broken(*args: Any) -> gpu.Part:
        raise RuntimeError("CUDA error")

    assert gpu.run(METER, [(8, 4, 16)], ["logits", "linear"], False, tmp_path) == 0
    monkeypatch.setattr(gpu, "logits_path", broken)
    assert gpu.run(METER, [(8, 4, 16)], ["logits", "linear"], False, tmp_path) == 1
    record = json.loads((tmp_path / "gpu.json").read_text())
    assert [section["failed"] for section in record["sections"]] == [True, False]
    assert record["sections"][0]["not_run"] == {"logits path": "RuntimeError: CUDA error"}
    assert record["ceilings"]["copy_bytes_per_s"] > 0


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu"])
    assert gpu.main() == 2
    assert capsys.readouterr().err == "benchmarks.gpu needs a CUDA device\n"
