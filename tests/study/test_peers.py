"""A study under `torchrun` against the same study in one process: real processes."""

import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from nvamp.study import StudyError
from nvamp.study.compare import compare
from nvamp.study.peers import Peers, hide, join
from nvamp.study.settings import Settings
from nvamp.study.store import Store
from tests.study.conftest import Silent, started, study, without_times

NVAMP = "from nvamp.cli import main; main()"
# The second rank fails once the first has finished a run.
SECOND_FAILS = f"""
import os, pathlib, sys, time
import nvamp.study.compare

def fail(*arguments):
    while not list(pathlib.Path(sys.argv[-1]).glob("runs/*.json")):
        time.sleep(0.1)
    raise RuntimeError("out of memory")

if os.environ["RANK"] == "1":
    nvamp.study.compare.train = fail
{NVAMP}
"""


def torchrun(code: str, arguments: list[str]) -> subprocess.Popen[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--no-python"]
    return started([*launcher, sys.executable, "-c", code, *arguments])


def ended(process: subprocess.Popen[str]) -> tuple[str, str]:
    """What it wrote to stdout and stderr."""
    try:
        return process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends its ranks then
        raise


def arguments(settings: Settings, out: Path) -> list[str]:
    """The options of `nvamp` for these settings; the directory is the last."""
    options: list[object] = ["--seeds", settings.seeds, "--steps", settings.steps]
    options += ["--batch-size", settings.batch_size, "--lr", settings.lr, "--noise", settings.noise]
    options += ["--model", settings.model, "--text", settings.text[0], "--out", out]
    losses = [f"--loss={loss}" for loss in settings.losses]
    return ["compare", *losses, *map(str, options)]


def said(err: str) -> list[str]:
    """What of the errors is not torchrun's report."""
    return [line for line in err.splitlines() if line.startswith("nvamp: ")]


def finished_runs(out: Path) -> list[str]:
    return sorted(path.stem for path in out.glob("runs/*.json"))


def numbers(results: dict[str, Any]) -> dict[str, Any]:
    return {**without_times(results), "command": None}


def test_two_ranks_continue_and_finish_what_one_process_would(
    settings: Settings, one: Settings, tmp_path: Path
) -> None:
    whole, _ = study(settings, tmp_path / "whole")
    out = tmp_path / "out"
    begun, _ = study(one, out)
    process = torchrun(NVAMP, arguments(settings, out))
    shown, err = ended(process)
    assert process.returncode == 0, err
    assert said(err) == []
    assert shown.count("1 of 4 runs are already finished") == 1
    for run in ("dft, seed 0", "ce, seed 1", "dft, seed 1"):
        assert shown.count(f"{run}: held-out cross-entropy") == 1
    assert shown.count("Report: ") == 1
    results, display = study(settings, out)  # of the runs that the ranks left
    assert display.trained == []
    assert results["runs"][0] == begun["runs"][0]
    assert numbers(results) == numbers(whole)
    assert not list(out.rglob("*.part"))


def test_a_failing_rank_ends_all_and_one_process_continues(settings: Settings, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = torchrun(SECOND_FAILS, arguments(settings, out))
    _, err = ended(process)
    kept = finished_runs(out)
    assert process.returncode != 0
    assert "RuntimeError: out of memory" in err
    # The first rank's, one or both.
    assert kept in (["ce-seed0"], ["ce-seed0", "ce-seed1"])
    assert said(err) == [
        f"nvamp: interrupted: {len(kept)} finished runs are kept in {out}; the same command continues"
    ]
    results, display = study(settings, out)
    assert display.kept == len(kept)
    whole, _ = study(settings, tmp_path / "whole")
    assert numbers(results) == numbers(whole)


def test_ctrl_c_keeps_the_finished_runs_of_all_ranks(settings: Settings, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = torchrun(NVAMP, arguments(replace(settings, seeds=200), out))
    deadline = time.monotonic() + 120
    one_of_each_rank = {"ce-seed0", "dft-seed0"}
    while not one_of_each_rank <= set(finished_runs(out)) and process.poll() is None:
        if time.monotonic() > deadline:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = ended(process)
    kept = finished_runs(out)
    assert process.returncode != 0
    assert len(kept) < 400
    assert one_of_each_rank <= set(kept)
    (line,) = said(err)
    assert line.startswith("nvamp: interrupted: ")
    assert line.endswith(f" finished runs are kept in {out}; the same command continues")
    assert "KeyboardInterrupt" not in err


def test_a_mistake_is_reported_once(tmp_path: Path) -> None:
    process = torchrun(NVAMP, ["compare", "--loss", "bogus", "--out", str(tmp_path / "out")])
    shown, err = ended(process)
    assert process.returncode != 0
    (line,) = said(err)
    assert line.startswith("nvamp: --loss bogus: unknown objective 'bogus', known are ce, nvamp, ")
    assert shown == ""
    assert list(tmp_path.iterdir()) == []


class Impatient(Silent):
    def waiting(self) -> None:
        raise KeyboardInterrupt


def test_each_rank_trains_its_own_share(settings: Settings, tmp_path: Path) -> None:
    store = dist.HashStore()
    with Store(tmp_path) as first, pytest.raises(KeyboardInterrupt):
        compare(settings, first, "", Impatient(), peers=Peers(0, 2, store))
    assert finished_runs(tmp_path) == ["ce-seed0", "ce-seed1"]
    assert compare(settings, Store(tmp_path), "", Silent(), peers=Peers(1, 2, store)) is None
    assert finished_runs(tmp_path) == ["ce-seed0", "ce-seed1", "dft-seed0", "dft-seed1"]
    assert not (tmp_path / "results.json").exists()


def test_ranks_that_differ_do_not_train(settings: Settings, tmp_path: Path) -> None:
    store = dist.HashStore()
    with Store(tmp_path / "out") as first, pytest.raises(KeyboardInterrupt):
        compare(settings, first, "", Impatient(), peers=Peers(0, 2, store))
    other = replace(settings, steps=5)
    with pytest.raises(StudyError, match=r"^the ranks differ: --steps 6 \(on rank 1: 5\)$"):
        compare(other, Store(tmp_path / "out"), "", Silent(), peers=Peers(1, 2, store))
    elsewhere = tmp_path / "elsewhere"
    with pytest.raises(StudyError, match=f"^--out {elsewhere}: not the directory of the first rank"):
        compare(settings, Store(elsewhere), "", Silent(), peers=Peers(1, 2, store))
    assert not elsewhere.exists()


def test_one_rank_has_the_word() -> None:
    store = dist.HashStore()
    assert [Peers(rank, 3, store).first_to_fail() for rank in (2, 0, 1)] == [True, False, False]
    assert Peers().first_to_fail()


@pytest.mark.parametrize(
    ("local", "visible", "device"),
    [
        ("1", None, "1"),
        ("0", "4,6", "4"),
        ("1", "4,6", "6"),
        ("0", "GPU-8932f937,GPU-2f2f2f2f", "GPU-8932f937"),
        ("2", "4,6", ""),  # more ranks than devices: found out as ranks that differ
        ("1", "", ""),  # no device wanted
        (None, None, "0"),  # no rank: the first, since of several the Trainer would make larger batches
        (None, "4,6", "4"),
        (None, "", ""),
    ],
)
def test_a_process_sees_its_own_device(local: str | None, visible: str | None, device: str) -> None:
    environ = {"HOME": "/"}
    if local is not None:
        environ |= {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": local, "LOCAL_WORLD_SIZE": "4"}
    if visible is not None:
        environ["CUDA_VISIBLE_DEVICES"] = visible
    hide(environ)
    assert environ == {"HOME": "/", "CUDA_VISIBLE_DEVICES": device}


@pytest.mark.parametrize(
    "left",
    [
        {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"},
        {"WORLD_SIZE": "2"},
        {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "localhost"},
    ],
)
def test_a_process_on_its_own(monkeypatch: pytest.MonkeyPatch, left: dict[str, str]) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    assert join() == Peers()
    assert not {"RANK", "LOCAL_RANK", "WORLD_SIZE"} & set(os.environ)


MEETING = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29999"}


def surrounded(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for name in (*MEETING, "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("RANK", "a", "from 0 to 1"),
        ("RANK", "", "from 0 to 1"),
        ("RANK", "-1", "from 0 to 1"),
        ("RANK", "2", "from 0 to 1"),
        ("WORLD_SIZE", "x", "from 1"),
        ("WORLD_SIZE", "0", "from 1"),
        ("MASTER_PORT", "x", "from 1 to 65535"),
        ("MASTER_PORT", "65536", "from 1 to 65535"),
    ],
)
def test_variables_that_make_no_sense(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, expected: str
) -> None:
    surrounded(monkeypatch, {**MEETING, name: value})
    with pytest.raises(StudyError) as error:
        join()
    assert str(error.value) == f"{name}={value} in the environment: expected an integer {expected}"


@pytest.mark.parametrize("value", ["a", "-1"])
def test_a_local_rank_that_makes_no_sense(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    surrounded(monkeypatch, {"LOCAL_RANK": value})
    with pytest.raises(
        StudyError, match=f"^LOCAL_RANK={value} in the environment: expected an integer from 0$"
    ):
        join()


def test_ranks_that_cannot_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("localhost", 0)) as taken:
        port = str(taken.getsockname()[1])
        surrounded(monkeypatch, {**MEETING, "MASTER_PORT": port})
        with pytest.raises(StudyError, match=f"^the ranks do not meet at localhost:{port}: [^\n]+$"):
            join()
