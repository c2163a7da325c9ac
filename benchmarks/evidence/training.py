"""Train the runs of the plan that are missing: several processes share a store, one thread each."""

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from math import inf
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
import torch

from benchmarks.evidence import plan
from benchmarks.evidence.held_out import TEMPERATURES, measure, predictions
from benchmarks.evidence.plan import Job
from benchmarks.evidence.store import Runs
from benchmarks.measure import machine
from nvamp.study import StudyError
from nvamp.study.files import hold, replacing
from nvamp.study.losses import Loss, parse_loss
from nvamp.study.metrics import cvar
from nvamp.study.store import Json, versions
from nvamp.study.training import Recipe, Run, train

STORE = Path("runs/evidence")
TEXT: tuple[str, ...] = ()  # the standard library's source
SWITCH = 0.7  # of the steps, after which "A>B" trains with B


class Switch:
    """A criterion that becomes another one after some calls."""

    def __init__(self, before: Any, after: Any, calls: int) -> None:
        self._before, self._after, self._left = before, after, calls

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._left -= 1
        return (self._before if self._left >= 0 else self._after)(*args, **kwargs)


def loss_of(job: Job) -> Loss:
    first, _, second = job.loss.partition(">")
    before = parse_loss(first)
    if not second:
        return before
    after = parse_loss(second)
    return Loss(after.spec, Switch(before.criterion, after.criterion, round(SWITCH * job.steps)))


def train_job(job: Job, runs: Runs) -> float:
    """Train a run, keep it, and return its seconds."""
    corpus, changes = runs.corpus, job.changes
    if job.text:
        corpus, changes = runs.others[job.text], {**changes, "model": str(runs.start)}
    recipe = Recipe(**{"steps": job.steps, "batch_size": job.batch_size, "lr": job.lr, **changes})
    run = train(loss_of(job), job.seed, recipe, corpus, lambda step, value: None)
    found = [] if run.diverged else predictions(run.model, runs.corpus.held_out)
    first = found[TEMPERATURES.index(1.0)].metrics() if found else None
    record: Json = {
        **job.as_json(),
        "diverged": run.diverged,
        "parameters": run.model.num_parameters(),
        "seconds": run.seconds,
        "text": corpus.fingerprint(),
        "versions": {**versions(), "processor": machine()["processor"]},
        "curve": run.curve,
        "metrics": tuned_metrics(run) if job.text else first,
        "first": first,
        "halves": found and measure(found, runs.documents, len(corpus.tokenizer)),
    }
    if job == plan.START:
        with replacing(runs.start) as directory:
            run.model.save_pretrained(directory)
            corpus.tokenizer.save_pretrained(directory)
    runs.save(job, record, run.nll)
    return run.seconds


def tuned_metrics(run: Run) -> Json:
    """The losses of the tokens to learn, in nats, and how many of them are the likeliest, in percent."""
    nll = run.nll.astype(np.float64)
    return {"mean": nll.mean(), "cvar": cvar(nll), "accuracy": 100 * run.scores.correct.mean()}


def work(jobs: Sequence[Job], runs: Runs, seconds: float) -> None:
    """Train what is missing and no other process holds; start nothing that would end after `seconds`."""
    torch.set_num_threads(1)
    begin, per_step = monotonic(), 0.0
    for job in jobs:
        if runs.load(job) is not None or (job.text and not runs.start.exists()):
            continue
        if monotonic() - begin + 1.15 * per_step * job.steps > seconds:
            continue
        runs.path(job).parent.mkdir(parents=True, exist_ok=True)
        lock = runs.path(job).with_suffix(".lock")
        try:
            held = hold(lock)
        except StudyError:  # another process trains it
            continue
        with held:
            if runs.load(job) is None:
                per_step = train_job(job, runs) / job.steps
                print(f"{job.name}: {per_step * job.steps:.0f} s", flush=True)
            lock.unlink(missing_ok=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evidence.training", description=__doc__)
    parser.add_argument("--out", type=Path, default=STORE)
    parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--only", nargs="+", default=(), help="groups of the plan")
    parser.add_argument("--seconds", type=float, default=inf, help="start nothing that would end later")
    args = parser.parse_args(arguments)
    without = () if torch.cuda.is_available() else plan.ON_A_CARD
    jobs = [
        job for job in plan.plan() if job.group not in without and (not args.only or job.group in args.only)
    ]
    runs = Runs(args.out, TEXT)
    if args.workers == 1:
        work(jobs, runs, args.seconds)
    else:
        _work_together(args.workers, sys.argv[1:] if arguments is None else arguments)


def _work_together(workers: int, arguments: Sequence[str]) -> None:
    """Run this program in several processes of one worker each, and wait for them."""
    command = [sys.executable, "-m", "benchmarks.evidence.training", *arguments, "--workers", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the workers end too
    processes = [subprocess.Popen(command, env=environment) for _ in range(workers)]
    try:
        codes = [process.wait() for process in processes]
    except BaseException:
        for process in processes:
            process.terminate()
        raise
    if any(codes):
        raise SystemExit(max(codes))


if __name__ == "__main__":
    main()
