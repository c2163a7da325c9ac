"""The GPU's benchmark as far as a CPU can tell: every part runs, and what goes wrong is told and contained."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import contest, correctness, engine, hazards, report
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.contest import Contender, Contest
from benchmarks.gpu.meter import Meter, OutOfTimeError, Sample, time_limit
from benchmarks.gpu.plan import GROUPS, SHAPES, TOY, Part, sheet
from benchmarks.gpu.rows import Rows, latest, read
from nvamp import LinearNVAMPLoss
from nvamp.functional import token_nll
from tests.processes import python
from tests.study.conftest import one_thread

__all__ = ["one_thread"]

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
SHAPE = TOY["24x16x129"]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(Meter(CPU), Rows(tmp_path / "rows.jsonl", "part"), [SHAPE], toy=True, peers=False)


def found(bench: Bench, kind: str) -> dict[str, dict[str, Any]]:
    return {row["what"]: row for row in latest(read(bench.rows.path)) if row["kind"] == kind}


# The whole of it ---------------------------------------------------------------------------------------


def dry_run(path: Path, out: Path) -> str:
    """Runs all parts, by the one command, without rich; what it printed."""
    (path / "rich.py").write_text("raise ImportError('rich is not to be needed')")
    command = ["-m", "benchmarks.gpu", "--dry-run", "--skip-peers", "--out", str(out), "--budget", "250"]
    paths = os.pathsep.join((str(path), os.environ.get("PYTHONPATH", "")))
    done = python(*command, PYTHONPATH=paths)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    return done.stdout


def test_every_part_runs(tmp_path: Path) -> None:
    out = tmp_path / "out"
    printed = dry_run(tmp_path, out)
    assert sorted(path.name for path in out.iterdir()) == ["gpu.json", "log.txt", "rows.jsonl"]
    record = json.loads((out / "gpu.json").read_text())
    parts = {section["part"]: section for section in record["sections"]}
    assert [name.partition(":")[0] for name in record["seconds"]] == GROUPS
    assert parts.keys() == record["seconds"].keys()
    assert {section["status"] for section in parts.values()} == {"done"}
    assert record["not_run"] == {}
    assert record["failed"] == []
    assert record["machine"]["torch"] == torch.__version__
    assert record["ceilings"]["copy_bytes_per_s"] > 0
    for name in parts:
        assert f"== {name}: done" in printed
    check_rows(record)


def check_rows(record: dict[str, Any]) -> None:
    parts = {section["part"].partition(":")[0]: section for section in record["sections"]}
    times = {name: {row["what"]: row for row in part.get("timing", [])} for name, part in parts.items()}
    ours = {"nvamp: scalar", "nvamp: cross-entropy", "nvamp: token", "original NVAMP"}
    assert times["logits"].keys() >= {contest.FLOOR, contest.METRICS, "nvamp: scalar, in place", *ours}
    assert times["linear"].keys() >= {contest.THREE, contest.FOUR, contest.THREE_OF_8, *ours}
    assert times["linear"]["nvamp: scalar"]["no_graph"] == "a CPU has no CUDA graphs"
    assert all(row["ms"] > 0 for part in times.values() for row in part.values())
    for name, least in {
        "overhead": 7,
        "small": 8,
        "kernels": 8,
        "chunks": 2,
        "odd": 14,
        "products": 3,
    }.items():
        assert len(times[name]) >= least, name
    cases = [row for row in times["kernels"].values() if row["own"]]
    assert len(cases) == 5  # each kernel as the library launches it, besides the sizes tried
    assert len(parts["logits"]["bar"]) == 4
    assert len(parts["linear"]["bar"]) == 4
    for name, least in {"hazards": 30, "accuracy": 100, "compile": 15}.items():
        checks = parts[name]["check"]
        assert len(checks) >= least
        assert all(check["met"] for check in checks)


# The run sheet -----------------------------------------------------------------------------------------

WRITE = "import os, signal, sys, time\nrow = lambda text: open(sys.argv[1], 'a').write(text)\n"
DONE = """row('{"part": "x", "kind": "done"}\\n')"""
FAKES = {
    "good": f'row(\'{{"part": "good", "kind": "timing", "what": "a"}}\\n\')\n{DONE}',
    "hangs": """
child = os.spawnl(os.P_NOWAIT, '/bin/sleep', 'sleep', '60')
row('{"part": "hangs", "kind": "timing", "what": "%d"}\\n{"part": "ha' % child)
time.sleep(60)
""",
    "dies": "os.kill(os.getpid(), signal.SIGSEGV)",
    "deaf": """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
row('{"part": "deaf", "kind": "note", "what": "%d"}\\n' % os.getpid())
time.sleep(60)
""",
    "wrong": f'row(\'{{"part": "wrong", "kind": "check", "what": "c", "measured": 2, "limit": 1, "met": false, "note": ""}}\\n\')\n{DONE}',
    "peerless": f'row(\'{{"part": "p", "kind": "not run", "what": "peer", "why": "missing", "ours": false}}\\n\')\n{DONE}',
    "ourless": f'row(\'{{"part": "o", "kind": "not run", "what": "nvamp", "why": "broken", "ours": true}}\\n\')\n{DONE}',
    "silent": "",
}


def run_fakes(
    out: Path, parts: list[Part], budget: float = 60
) -> tuple[int, dict[str, gpu.Outcome], dict[str, Any]]:
    def command(part: Part, limit: float) -> list[str]:
        return [sys.executable, "-S", "-E", "-c", WRITE + FAKES[part.name], str(out / "rows.jsonl")]

    run = gpu.RunSheet(out, budget, command)
    status = run.run(parts)
    return status, {o.part: o for o in run.outcomes}, json.loads((out / "gpu.json").read_text())


def test_what_goes_wrong_costs_one_part(tmp_path: Path) -> None:
    start = time.monotonic()
    status, ended, record = run_fakes(tmp_path, [Part(name, 1.5, 0) for name in FAKES])
    assert time.monotonic() - start < 30
    assert status == 1
    assert {name: outcome.status for name, outcome in ended.items()} == {
        "good": "done",
        "hangs": "ran out of time",
        "dies": "broke off",
        "deaf": "ran out of time",
        "wrong": "done",
        "peerless": "done",
        "ourless": "done",
        "silent": "broke off",  # it did not say that it was done
    }
    assert record["failed"] == ["hangs", "dies", "deaf", "wrong", "ourless", "silent"]
    assert record["not_run"]["dies"] == "ended by signal 11"
    assert [row["what"] for row in ended["wrong"].rows[:1]] == ["c"]
    (row,) = ended["hangs"].rows  # what it wrote before, not half a line; and what it started is gone
    assert not alive(int(row["what"]))
    assert not alive(int(ended["deaf"].rows[0]["what"]))
    assert len(read(tmp_path / "rows.jsonl")) == sum(len(outcome.rows) for outcome in ended.values())


def alive(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_the_budget_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(gpu, "GRACE", 0.2)
    parts = [Part("wrong", 9, 5), Part("good", 9, 0), Part("hangs", 60, 0.5), Part("silent", 9, 0.1)]
    start = time.monotonic()
    status, ended, record = run_fakes(tmp_path, parts, budget=1.5)
    assert time.monotonic() - start < 6
    assert ended["hangs"].status == "ran out of time"
    assert not ended["hangs"].failed  # the budget ended it, not its limit
    assert ended["good"].status == "done"
    assert ended["silent"].status == ended["wrong"].status == "skipped"
    assert record["not_run"]["silent"] == "0 s left, it needs 0"
    assert "== wrong: skipped, 1 s left, it needs 5" in capsys.readouterr().out
    assert status == 0


INTERRUPTED = """
import signal
import sys
from pathlib import Path
from benchmarks.gpu.__main__ import RunSheet
from benchmarks.gpu.plan import Part
child = "import os, sys, time; open(sys.argv[1], 'a').write('{\\"part\\": \\"x\\", \\"kind\\": \\"note\\", \\"what\\": \\"%d\\"}\\\\n' % os.getpid()); time.sleep(60)"
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
out = Path(sys.argv[1])
run = RunSheet(out, 60, lambda part, limit: [sys.executable, "-S", "-c", child, str(out / "rows.jsonl")])
sys.exit(run.run([Part("first", 50, 0), Part("second", 50, 0)]))
"""


def test_an_interruption_keeps_what_was_written(tmp_path: Path) -> None:
    run = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, str(tmp_path)], cwd=ROOT, stdout=subprocess.DEVNULL
    )
    written = tmp_path / "rows.jsonl"
    while not (written.exists() and written.read_text()):
        time.sleep(0.02)
    run.send_signal(signal.SIGINT)
    assert run.wait(10) == 130
    record = json.loads((tmp_path / "gpu.json").read_text())
    assert [section["status"] for section in record["sections"]] == ["interrupted"]
    assert not alive(int(record["sections"][0]["note"][0]["what"]))


def test_without_a_gpu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpu.main(["--out", str(tmp_path), "--only", "hazards"]) == 2
    assert "needs a CUDA device" in capsys.readouterr().err


def test_parts_by_name_and_group(capsys: pytest.CaptureFixture[str]) -> None:
    def listed(*arguments: str) -> list[str]:
        assert gpu.main([*arguments, "--list"]) == 0
        return [line.split()[0] for line in capsys.readouterr().out.splitlines()]

    assert len(listed()) == len(sheet(list(SHAPES))) == len(GROUPS) - 3 + 3 * len(SHAPES)
    one = "32768x576x49152"
    assert listed("--only", "linear", "small", "--shapes", one) == ["machine", f"linear:{one}", "small"]
    assert listed("--only", f"logits:{one}") == ["machine", f"logits:{one}"]
    with pytest.raises(SystemExit):
        gpu.main(["--only", "speed"])
    assert "no such part: speed" in capsys.readouterr().err


def test_the_parent_needs_no_torch() -> None:
    """Nor what the parts' device does to those who use it."""
    code = "import sys, benchmarks.gpu.__main__; sys.exit('torch' in sys.modules)"
    assert python("-c", code).returncode == 0


# Contests ----------------------------------------------------------------------------------------------


def test_a_contender_that_does_not_run_says_why(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, contest.LIGER, None)
    h, w, y = contest.inputs(bench, SHAPE)
    peers = {c.name: c for c in contest.linear_peers(h, w, y, lambda: h.sum())}

    def full() -> None:
        raise torch.OutOfMemoryError("out of [memory]")

    def slow() -> None:
        while True:
            time.sleep(0.01)

    contenders = [
        Contender("nvamp: scalar", lambda: lambda: None),
        Contender("full", lambda: full),
        peers[contest.LIGER_FLOAT32],
        Contender("slow", lambda: slow, seconds=1),
        Contender("nvamp: token", lambda: full),
    ]
    Contest(bench).run(contenders)
    rows = found(bench, "not run")
    assert rows["full"]["why"] == "OutOfMemoryError: out of [memory]"
    assert rows["Liger, float32 sum"]["why"].startswith("ModuleNotFoundError")
    assert rows["slow"]["why"] == "OutOfTimeError: took more than 1 s"
    assert [what for what, row in rows.items() if row["ours"]] == ["nvamp: token"]
    assert found(bench, "timing").keys() == {"nvamp: scalar"}


def test_later_rounds_replace_a_row(bench: Bench) -> None:
    bench.toy = False
    Contest(bench).run([Contender("a", lambda: lambda: None)])
    rows = [row for row in read(bench.rows.path) if row["kind"] == "timing"]
    assert [row["runs"] for row in rows] == [1, 2, 3]
    assert [row["runs"] for row in latest(rows)] == [3]


def test_rounds_end_with_the_time(bench: Bench) -> None:
    calls: list[str] = []

    def contender(name: str, seconds: float) -> Contender:
        def step() -> None:
            calls.append(name)
            time.sleep(seconds)

        return Contender(name, lambda: step)

    bench.toy, bench.deadline = False, time.monotonic() + 4.6
    Contest(bench).run([contender("a", 0.35), contender("b", 0.35)])
    assert calls == ["a"] * 3 + ["b"] * 3  # started, for its memory, timed; no second round
    bench.deadline = time.monotonic() + 0.5
    Contest(bench).run([contender("c", 0)])
    assert "c" not in calls
    assert not found(bench, "not run")["c"]["ours"]


def sampled(bench: Bench, times: dict[str, tuple[float, float | None]]) -> Contest:
    """A contest with these milliseconds, in a loop and by a graph."""
    made = Contest(bench)
    for name, (ms, graph) in times.items():
        made.samples[name] = Sample([ms], [] if graph is None else [graph], [ms])
    return made


def test_bars_of_the_linear_path(bench: Bench) -> None:
    times = {
        "nvamp: scalar": (3.0, 1.2),
        "nvamp: cross-entropy": (3.0, 1.0),
        "nvamp: token": (3.0, 2.5),
        contest.THREE: (9.0, 1.5),
        contest.THREE_OF_8: (9.0, 1.0),
        contest.FOUR: (9.0, 2.0),
        contest.LIGER_FLOAT32: (1.5, None),  # could not be captured
        "eager": (9.0, 8.0),
        "CCE, filtering": (0.1, 0.1),
    }
    made = sampled(bench, times)
    made.extra_bytes = {"nvamp: scalar": 246 << 20}  # V·D is 32 MiB, N·D is 1 MiB
    contenders = [
        Contender(name, lambda: lambda: None, peer=name.startswith(("Liger", "eager"))) for name in times
    ]
    shape, chunk = (512, 2048, 16384), 12 << 20
    # The least to move takes 0.2 ms: logits twice, and a float32 sum of two chunks once.
    copy = (4 * 512 * 16384 + 8 * 16384 * 2048) / 0.2e-3
    contest.linear_bars(made, contenders, shape, [chunk, chunk], copy)
    bars = list(found(bench, "bar").values())
    assert [(bar["measured"], bar["limit"], bar["by"]) for bar in bars] == [
        (pytest.approx(1.2 / (1.0 + 0.2)), 1.1, "graph_ms"),
        (2.0, 1.0, "ms"),
        (1.25, 1.25, "graph_ms"),
        (1.2, 1.02, "graph_ms"),
        (pytest.approx(246 / (6 * 32 + 2 + 12)), 1.0, "bytes"),
    ]
    assert bars[1]["what"] == "nvamp: scalar, over Liger, float32 sum, the fastest exact peer"
    assert [bar["met"] for bar in bars] == [True, False, True, False, False]
    assert bars[4]["what"].endswith("and a chunk of 12 MiB")
    contest.linear_bars(made, contenders, (512, 768, 16384), [chunk], copy)
    assert sum("four" in row["what"] for row in read(bench.rows.path)) == 1  # only of many features


def test_bars_of_the_logits_path(bench: Bench) -> None:
    made = sampled(
        bench, {"nvamp: scalar": (2.0, 1.22), contest.LIGER_IN_PLACE: (1.0, None), "eager": (3, 1.22)}
    )
    made.expect(contest.FLOOR, 1.0)
    made.samples["nvamp: scalar, in place"] = Sample([1.6], [1.0], [1.0])
    made.samples |= {contest.NLL: Sample([1.0], [1.0], [1.0]), contest.METRICS: Sample([9.0], [1.2], [1.0])}
    contenders = [Contender(name, lambda: lambda: None, peer=name == "eager") for name in made.samples]
    contest.logits_bars(made, contenders, 50257)
    contest.logits_bars(made, contenders, 50264)
    bars = [row for row in read(bench.rows.path) if row["kind"] == "bar"]
    odd, even = bars[:4], bars[4:]
    assert [(bar["measured"], bar["met"]) for bar in odd] == [
        (1.22, True),
        (1.6, False),
        (1.0, True),
        (1.2, False),
    ]
    assert [bar["limit"] for bar in odd] == [1.25, 1.5, 1.0, 1.1]
    assert even[0]["limit"] == 1 / 0.85
    assert not even[0]["met"]


# What is measured --------------------------------------------------------------------------------------


class FakeGPU(Meter):
    on_gpu = True  # type: ignore[assignment]

    def sync(self) -> None: ...
    def free(self) -> None: ...
    def _once(self, step: Any) -> float:
        return 50.0

    def _loop(self, step: Any, steps: int) -> Any:
        step()
        return [float(steps)], [], [0.5, 0.25]

    def _must_not_wait(self, step: Any) -> None:
        if step == waiting:
            raise RuntimeError("called a synchronizing CUDA operation")

    def _replays(self, step: Any, steps: int) -> list[float]:
        return [0.5, 1.5, 2.5]


def waiting() -> None: ...


def test_a_graph_and_the_reason_for_none() -> None:
    meter = FakeGPU(CPU)
    row = meter.measure(lambda: None).as_row()
    assert (row["ms"], row["graph_ms"], row["host_ms"]) == (4.0, 1.5, 0.25)
    assert (row["smallest_ms"], row["largest_ms"], row["runs"]) == (0.5, 2.5, 3)
    assert "no_graph" not in row
    row = meter.measure(waiting).as_row()
    assert (row["ms"], row["graph_ms"]) == (4.0, None)
    assert row["no_graph"] == "RuntimeError: called a synchronizing CUDA operation"
    assert meter.measure(waiting, may_wait=False).as_row()["graph_ms"] == 1.5
    assert meter.measure(waiting, graph=False).as_row()["graph_ms"] is None


def test_a_time_limit_ends_what_it_holds() -> None:
    before = signal.getsignal(signal.SIGALRM)

    def held() -> None:
        with time_limit(0.05):
            time.sleep(10)

    with pytest.raises(OutOfTimeError, match="more than 0 s"):
        held()
    with time_limit(0.05):
        pass
    time.sleep(0.1)
    assert signal.getsignal(signal.SIGALRM) == before


def test_sizes_are_those_of_the_library_s_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []
    launch = engine.triton.launch

    def watched(kernel: Any, programs: int, sizes: Any, *args: Any, **constants: Any) -> None:
        seen.append((sizes.block, sizes.num_warps))
        launch(kernel, programs, sizes, *args, **constants)

    monkeypatch.setattr(engine.triton, "launch", watched)
    x, y = torch.randn(2, 40), torch.tensor([1, 39])
    with engine.sizes_of(16, 2):
        nll, norm, *_ = engine.triton.token_nll(x, y, False, engine.Options())
        engine.triton.token_nll_backward(nll, x, y, norm, engine.Options(), out=torch.empty_like(x))
        engine.triton.unit_gradient_(x, y, engine.Options())
    assert seen == [(16, 2)] * 3
    engine.triton.token_nll(x, y, False, engine.Options())
    assert seen[-1] != (16, 2)


def test_chunks_are_those_of_the_linear_path() -> None:
    h, w = torch.randn(40, 8, requires_grad=True), torch.randn(64, 8)
    criterion = LinearNVAMPLoss(shift=False)
    with engine.chunks_of(10), engine.counted() as found:
        criterion(h, w, torch.arange(40))
    assert found == [10 * 64 * 4] * 4
    with engine.counted() as found:
        criterion(h, w, torch.arange(40))
    assert found == [40 * 64 * 4]


def test_a_sweep_is_summed_up() -> None:
    rows = [
        {
            "part": "kernels",
            "kind": "timing",
            "what": f"nll {ms}",
            "case": "nll",
            "own": ms == 3.0,
            "ms": ms,
            "graph_ms": None,
        }
        for ms in (4.0, 3.0, 2.0)
    ]
    text = report.summary("kernels", "done", 1, "", rows)
    assert "nll 3.0" in text
    assert "nll 2.0" in text
    assert "nll 4.0" not in text


# Correctness -------------------------------------------------------------------------------------------


def wrong_kernel(change: Callable[[Tensor], object]) -> Any:
    right = engine.triton.unit_gradient_

    def unit_gradient_(logits: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        nll = right(logits, *args, **kwargs)
        change(logits)
        return nll

    return unit_gradient_


@pytest.mark.parametrize(
    ("change", "seen"),
    [
        (lambda x: None, ""),
        (lambda x: x.as_strided((1,), (1,), x.storage_offset() - 1).zero_(), "written to"),
        (lambda x: x[:, -1].mul_(1.01), "relative error"),
        (lambda x: x[-1, -1].add_(torch.rand(())), "differ"),
    ],
    ids=["right", "before the rows", "last column", "a race"],
)
def test_a_wrong_kernel_is_seen(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, change: Callable[[Tensor], object], seen: str
) -> None:
    monkeypatch.setattr(engine.triton, "unit_gradient_", wrong_kernel(change))
    hazards.unit_gradient(bench, 6, 37, 48, torch.float32, 2)
    wrong = [what for what, row in found(bench, "check").items() if not row["met"]]
    assert bool(wrong) == bool(seen)
    assert any(seen in what for what in wrong) or not seen


def test_a_wrong_result_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(x: Tensor, y: Tensor, return_metrics: bool = False, **options: Any) -> Any:
        nll = 1.01 * F.cross_entropy(x, y, reduction="none")
        return (nll, token_nll(x, y, return_metrics=True)[1]) if return_metrics else nll

    args = ("", CPU, torch.float32, (40, 8, 65), "chunked")
    right = list(correctness.errors(*args))
    monkeypatch.setattr(correctness, "token_nll", wrong)
    bars = list(correctness.errors(*args))
    for bar, before in zip(bars, right, strict=True):
        assert (bar.measured > 100 * before.measured) == (", logits, " in bar.what and "part" not in bar.what)


def test_a_check_that_breaks_is_on_record(bench: Bench) -> None:
    def broken() -> Any:
        raise RuntimeError("CUDA error")

    correctness.check(bench, "this", broken)
    bench.rows.check("that", float("nan"), 1)
    assert found(bench, "not run")["this"] == {
        "part": "part",
        "kind": "not run",
        "what": "this",
        "why": "RuntimeError: CUDA error",
        "ours": True,
    }
    assert found(bench, "check")["that"]["met"] is False
    assert found(bench, "check")["that"]["measured"] is None  # JSON has no NaN
    bench.deadline = time.monotonic()
    correctness.check(bench, "late", broken)
    assert found(bench, "not run")["late"]["why"] == "no time left"
