"""The benchmark measures what it says; its figures are not tested, they are read."""

import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from benchmarks import accumulation, accuracy, cpu, measure, patching, vocabulary


def test_contenders_run_in_turn_and_slow_ones_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now, calls = [0.0], []
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])

    def contender(name: str, seconds: float) -> measure.Run:
        def run() -> None:
            calls.append(name)
            now[0] += seconds

        return run

    timings = measure.time_in_turn({"quick": contender("quick", 1), "slow": contender("slow", 60)}, 3)
    assert calls == ["quick", "quick", "slow", "slow"] + ["quick"] * 4
    assert (timings["quick"].runs, timings["quick"].median_s) == (3, 1)
    assert (timings["slow"].runs, timings["slow"].largest_s) == (1, 60)


def test_peak_counts_what_is_held_at_once() -> None:
    def run() -> torch.Tensor:
        held = torch.zeros(3 * 2**18)  # 3 MiB
        for _ in range(3):
            held = held + 1  # as much again, while the sum is made
        return held

    assert measure.peak_bytes(run) == pytest.approx(6 * 2**20, abs=1000)


def test_sections(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "has_compiler", lambda: False)
    for section in (cpu.logits_path("bfloat16", 1, n=8, vocab=64), cpu.linear_path("float32", 1, 8, 4, 64)):
        section.show()
        record = json.loads(json.dumps(section.as_json()))
        assert record["ratios"][section.baseline] == 1
        assert all(math.isfinite(bar["measured"]) for bar in record["bars"])
        assert {"nvamp: cross-entropy", "nvamp: scalar", "nvamp: token"} <= record["timings"].keys()


@pytest.mark.parametrize("dtype", cpu.DTYPES)
def test_contenders_of_a_policy_compute_the_same(monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    monkeypatch.setattr(cpu, "has_compiler", lambda: False)
    trained = cpu.policy(dtype, 1, False, 8, 4, 64)
    found: dict[str, Any] = {}
    timed = cpu.time_in_turn

    def results(runs: dict[str, measure.Run], repeats: int) -> dict[str, measure.Timing]:
        found.update({name: run() for name, run in runs.items()})
        return timed(runs, repeats)

    monkeypatch.setattr(cpu, "time_in_turn", results)
    for section in (trained, cpu.policy(dtype, 1, True, 8, 4, 64)):
        section.show()
        assert [*section.timings] == [
            cpu.EAGER_BOTH,
            cpu.OURS_BOTH,
            "TRL, chunked",
            "Liger's fallback, from verl",
        ]
        assert len(section.bars) == 6
        assert all(math.isfinite(bar.measured) for bar in section.bars)
    nll, entropy = found.pop(cpu.EAGER_BOTH)
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == "float32" else {"rtol": 0.02, "atol": 0.02}
    for own_nll, own_entropy in found.values():  # TRL's are log-probabilities
        torch.testing.assert_close((own_nll.abs(), own_entropy.float()), (nll, entropy), **close)


def test_few_rows() -> None:
    section = cpu.small(1, rows=(1, 3), vocab=64)
    section.show()
    assert section.timings.keys() == {"eager, 1", "nvamp, 1", "eager, 3", "nvamp, 3"}
    assert all(math.isfinite(bar.measured) for bar in section.bars)


def test_a_missed_bar_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    timing = measure.Timing(1.0, 1.0, 1.0, 1)
    cpu.Section(
        "", "x", {"x": timing}, bars=[cpu.Bar("too slow", 1.2, 1.1), cpu.Bar("fine", 1.1, 1.1)]
    ).show()
    lines = [line.split()[0] for line in capsys.readouterr().out.splitlines() if "at most" in line]
    assert lines == ["missed", "met"]


def test_the_accuracy_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, size in (("N", 64), ("D", 8), ("V", 128)):
        monkeypatch.setattr(accuracy, name, size)
    monkeypatch.setattr(sys, "argv", ["accuracy", "--out", str(tmp_path)])
    accuracy.main()
    rows = json.loads((tmp_path / "accuracy.json").read_text())["rows"]
    assert [row["chunks"] for row in rows[:5]] == [1, 2, 4, 8, 32]
    assert rows[0]["recompute, bfloat16 sums"] == pytest.approx(1)  # one chunk: eager's own product


class Logits(nn.Module):
    """A model of one table: the logits of the token after each token."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 11)

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.table(input_ids))


def test_accumulated_gradients_are_off_by_the_dispersion_and_the_maximum() -> None:
    torch.manual_seed(0)
    blocks, model = torch.randint(11, (64, 9)), Logits()
    rows = accumulation.distances(model, blocks, gamma=0.5)
    assert [row["tokens"] for row in rows] == [256, 128, 64, 32, 16, 8]
    assert all(row[mode] > 1e-3 for row in rows for mode in accumulation.MODES)


def test_contenders_of_a_sharded_vocabulary_compute_the_same(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        logits = DTensor.from_local(torch.randn(6, 9), mesh, [Shard(1)]).requires_grad_()
        gradients: dict[str, Tensor] = {}
        for name, run in vocabulary.contenders(logits, torch.arange(6)).items():
            handle = logits.register_hook(
                lambda grad, name=name: gradients.update({name: grad.full_tensor()})
            )
            run()
            handle.remove()
    finally:
        dist.destroy_process_group()
    expected = gradients.pop(vocabulary.LOSS_PARALLEL)
    torch.testing.assert_close(gradients.pop("nvamp: cross-entropy"), expected)
    for gradient in gradients.values():
        assert torch.isfinite(gradient).all()
        assert not torch.allclose(gradient, expected)


def test_a_step_of_a_patched_model_is_one_of_nvamp() -> None:
    seen: dict[str, torch.Tensor] = {}
    tokens = torch.randint(31, (2, 9))
    for name, run in patching.steps(31, 16, tokens).items():
        run()
        model = run.__closure__[0].cell_contents  # type: ignore[index]
        seen[name] = model(input_ids=tokens, labels=tokens).loss.detach()
    torch.testing.assert_close(seen["patch"], seen["loss_function"])
    assert seen["patch"] != seen["transformers' cross-entropy"]


def test_the_memory_of_a_step_of_compare(tmp_path: Path) -> None:
    toy = ["--vocab", "20000", "--hidden", "28", "--rows", "1", "--out", str(tmp_path)]
    ended = subprocess.run(
        [sys.executable, "-m", "benchmarks.study_memory", *toy], capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    record = json.loads((tmp_path / "study_memory.json").read_text())
    of_step = {way: found["peak"] - found["before"] for way, found in record["bytes"].items()}
    assert of_step["logits"] - of_step["linear"] > 0.7 * 4 * 512 * 20000  # the logits, roughly
