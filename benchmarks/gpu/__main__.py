"""Runs the parts, each in a process of its own with a limit, within a budget of seconds.

A hang, a sticky device error or a failing peer costs only that part. The run writes three files: rows.jsonl
has every result, written at once; log.txt has what the parts printed; gpu.json has all results in order. The
exit status is 1 if a check of correctness fails or a part of ours breaks off, 2 without a GPU. Bars of speed
and memory are only reported as met or missed.
"""

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from benchmarks.gpu.child import NO_GPU, own_limit
from benchmarks.gpu.plan import GROUPS, SHAPES, TOY, Part, chosen, sheet
from benchmarks.gpu.report import summary
from benchmarks.gpu.rows import Row, latest, read

Command = Callable[[Part, float], list[str]]  # (part, its limit in seconds) -> command line
GRACE = 3.0  # seconds for a process to end when asked to, and for the end of the run


@dataclass
class Outcome:
    """How a part ended."""

    part: str
    status: str  # done, broke off, ran out of time, skipped, interrupted
    seconds: float = 0.0
    why: str = ""
    failed: bool = False
    rows: list[Row] = field(default_factory=list)


class RunSheet:
    """Runs parts one after the other and keeps the record."""

    def __init__(self, out: Path, budget: float, command: Command) -> None:
        self.out, self.command = out, command
        self.end = time.monotonic() + budget
        self.started = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self.outcomes: list[Outcome] = []
        out.mkdir(parents=True, exist_ok=True)
        for name in ("rows.jsonl", "log.txt"):
            (out / name).write_text("")

    @property
    def rows_file(self) -> Path:
        return self.out / "rows.jsonl"

    def run(self, parts: list[Part]) -> int:
        """Runs the parts and returns the exit status. The record is written after each part."""
        for part in parts:
            outcome = self._run(part)
            self.outcomes.append(outcome)
            print(
                summary(outcome.part, outcome.status, outcome.seconds, outcome.why, outcome.rows), flush=True
            )
            self._write()
            if outcome.status == "interrupted":
                return 130
            if outcome.status == "no GPU":
                print("benchmarks.gpu needs a CUDA device; --dry-run does without", file=sys.stderr)
                return 2
        print(f"wrote {self.out / 'gpu.json'}")
        return int(any(outcome.failed for outcome in self.outcomes))

    def _run(self, part: Part) -> Outcome:
        left = self.end - time.monotonic() - GRACE
        if left < part.least:
            return Outcome(part.name, "skipped", why=f"{max(left, 0):.0f} s left, it needs {part.least:.0f}")
        limit, offset, start = min(part.limit, left), self.rows_file.stat().st_size, time.monotonic()
        status = self._status(part, limit)
        outcome = Outcome(part.name, "", time.monotonic() - start)
        end_line(self.rows_file)
        outcome.rows = latest(read(self.rows_file, offset))
        judge(outcome, status, limit, cut=limit < part.limit)
        return outcome

    def _status(self, part: Part, limit: float) -> int | str:
        """The exit status of a part's process, or the reason for its end: "timeout" or "interrupted"."""
        with (self.out / "log.txt").open("a") as log:
            log.write(f"\n==== {part.name}\n")
            log.flush()
            process = subprocess.Popen(
                self.command(part, limit),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # it ends together with its own children
            )
            try:
                return process.wait(limit)
            except subprocess.TimeoutExpired:
                return "timeout"
            except KeyboardInterrupt:
                return "interrupted"
            finally:
                end(process)

    def _write(self) -> None:
        rows = [row for outcome in self.outcomes for row in outcome.rows]
        record = {
            "date": self.started,
            "machine": first(rows, "machine"),
            "ceilings": first(rows, "ceilings"),
            "failed": [outcome.part for outcome in self.outcomes if outcome.failed],
            "seconds": {outcome.part: round(outcome.seconds, 1) for outcome in self.outcomes},
            "not_run": {o.part: o.why for o in self.outcomes if o.status != "done"},
            "sections": [section(outcome) for outcome in self.outcomes if outcome.rows],
        }
        new = self.out / "gpu.json.new"
        new.write_text(json.dumps(record, indent=1, ensure_ascii=False))
        new.replace(self.out / "gpu.json")


def judge(outcome: Outcome, status: int | str, limit: float, cut: bool) -> None:
    """Records how a part ended. A part that the budget cut short has not failed."""
    kinds = {row["kind"]: row for row in outcome.rows}
    if status == "interrupted":
        outcome.status = "interrupted"
    elif status == NO_GPU:
        outcome.status = "no GPU"
    elif status == 0 and "done" in kinds:
        outcome.status = "done"
    elif "broke off" in kinds:
        outcome.status, outcome.why, outcome.failed = "broke off", kinds["broke off"]["why"], True
    elif status == "timeout" or (status == 1 and outcome.seconds >= own_limit(limit)):
        outcome.status, outcome.failed = "ran out of time", not cut
        outcome.why = f"ended after {limit:.0f} s; log.txt shows where it was"
    else:
        signalled = isinstance(status, int) and status < 0
        outcome.why = f"ended by signal {-int(status)}" if signalled else f"exit status {status}"
        outcome.status, outcome.failed = "broke off", True
    wrong = [r for r in outcome.rows if r["kind"] == "check" and not r["met"]]
    missing = [r for r in outcome.rows if r["kind"] == "not run" and r["ours"]]
    outcome.failed = outcome.failed or bool(wrong or missing)


def section(outcome: Outcome) -> dict[str, Any]:
    """The rows of a part by their kind, without the fields that all of them share."""
    found: dict[str, Any] = {"part": outcome.part, "status": outcome.status, "failed": outcome.failed}
    for row in outcome.rows:
        fields = {key: value for key, value in row.items() if key not in ("part", "kind")}
        if fields:
            found.setdefault(row["kind"], []).append(fields)
    return found


def first(rows: list[Row], kind: str) -> dict[str, Any]:
    found = next((row for row in rows if row["kind"] == kind), {})
    return {key: value for key, value in found.items() if key not in ("part", "kind")}


def end(process: "subprocess.Popen[bytes]") -> None:
    """Ends a process and all its children. A process that the driver holds on to is left behind."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE / 2)


def end_line(path: Path) -> None:
    """Ends a last line that a killed process left unfinished, so that the next row starts on a new one."""
    with path.open("rb+") as file:
        if file.seek(0, os.SEEK_END) and file.seek(-1, os.SEEK_END) is not None and file.read(1) != b"\n":
            file.write(b"\n")


def command(rows: Path, options: list[str]) -> Command:
    """Starts a part as `benchmarks.gpu.child`."""

    def of(part: Part, limit: float) -> list[str]:
        started = [sys.executable, "-u", "-m", "benchmarks.gpu.child", part.name]
        return [*started, "--rows", str(rows), "--limit", f"{limit:.1f}", *options]

    return of


def main(arguments: list[str] | None = None) -> int:
    shapes = [*SHAPES, *TOY]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds for all of it")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder for the three files")
    parser.add_argument("--only", nargs="+", default=[], metavar="PART", help="names or groups: --list")
    parser.add_argument("--shapes", choices=shapes, nargs="+", help="N x D x V of logits and linear")
    parser.add_argument("--list", action="store_true", help="print the parts and run none")
    parser.add_argument("--skip-peers", action="store_true", help="eager PyTorch as the only peer")
    parser.add_argument("--dry-run", action="store_true", help="toy sizes on the CPU")
    args = parser.parse_args(arguments)
    all_parts = sheet(args.shapes or list(TOY if args.dry_run else SHAPES))
    unknown = set(args.only) - {part.name for part in all_parts} - set(GROUPS)
    if unknown:
        parser.error(f"no such part: {', '.join(sorted(unknown))}; see --list")
    parts = chosen(all_parts, args.only)
    if args.list:
        print("\n".join(f"{part.name:28} at most {part.limit:.0f} s" for part in parts))
        return 0
    options = [name for name in ("--dry-run", "--skip-peers") if getattr(args, name[2:].replace("-", "_"))]
    signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGINT))  # keep what was written then, too
    return RunSheet(args.out, args.budget, command(args.out / "rows.jsonl", options)).run(parts)


if __name__ == "__main__":
    sys.exit(main())
