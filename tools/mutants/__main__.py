"""Changes the code in small ways, one after the other, and reports which changes no test sees.

    python -m tools.mutants [--only TEXT ...] [--minutes M]

The mutants are those of the modules beside this one. Each is made in a copy of the working tree, where the
tests that must fail are run, once they have passed without it. With `--minutes` they are drawn by the day's
date until time is up. The exit code is 1 if a mutant survives, is no longer to be found in the code, or has
tests that fail without it.
"""

import argparse
import datetime
import multiprocessing
import os
import random
import runpy
import shutil
import sys
import tempfile
import time
from pathlib import Path

from tools.mutants import of_engine, of_integrations, of_kernels, of_objectives, of_study
from tools.mutants.mutant import Mutant
from tools.mutants.tests import RESULTS, run

ROOT = Path(__file__).parents[2]
COPIED = ("src", "tests", "benchmarks", "tools", "docs", "examples", "pyproject.toml", "README.md")
AREAS = (of_engine, of_kernels, of_objectives, of_integrations, of_study)
MUTANTS = [mutant for area in AREAS for mutant in area.MUTANTS]
LONGEST = 120  # seconds for the tests of a mutant
# Imported once: the process that runs a mutant's tests is a fork of one that has them.
IMPORTED = ["pytest", "torch._dynamo", "triton", "transformers.trainer", "trl.trainer.sft_trainer"]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", default=[""], metavar="TEXT", help="files whose name has it")
    parser.add_argument("--minutes", type=float, help="a draw by the date; all of them by default")
    arguments = parser.parse_args()
    chosen = [m for m in MUTANTS if any(text in m.file for text in arguments.only)]
    if arguments.minutes is not None:
        random.Random(datetime.date.today().isoformat()).shuffle(chosen)
    end = time.monotonic() + 60 * (arguments.minutes or float("inf"))
    survivors = 0
    passing: set[tuple[str, str]] = set()
    prepare()
    with tempfile.TemporaryDirectory() as directory:
        copy = copied(Path(directory))
        for number, mutant in enumerate(chosen, 1):
            if time.monotonic() > end:
                print(f"time is up after {number - 1} of {len(chosen)}")
                break
            result = tried(mutant, copy, passing)
            survivors += result != "killed"
            print(f"{number}/{len(chosen)} {result}: {mutant.file}: {mutant.old.strip()!r}", flush=True)
    print(f"{survivors} not killed")
    return int(survivors > 0)


def prepare() -> None:
    """Settings that the processes of tests must have before they import anything."""
    runpy.run_path(str(ROOT / "tests" / "conftest.py"))
    os.environ |= {
        "OMP_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }  # bytecode could be of another mutant
    multiprocessing.set_start_method("forkserver")
    multiprocessing.set_forkserver_preload(IMPORTED)


def copied(directory: Path) -> Path:
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, directory / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, directory)
    return directory


def tried(mutant: Mutant, copy: Path, passing: set[tuple[str, str]]) -> str:
    """What became of a mutant: killed, survived, or why that is not known.

    Its tests must pass without it; those that have are in `passing`, where this adds more.
    """
    path = copy / mutant.file
    text = path.read_text()
    if text.count(mutant.old) != 1:
        return f"occurs {text.count(mutant.old)} times, not once"
    tests = mutant.tests, mutant.names
    if tests not in passing:
        if (result := ended(*tests, copy)) != "survived":
            return f"unknown, without it: {result}"
        passing.add(tests)
    path.write_text(text.replace(mutant.old, mutant.new))
    try:
        return ended(*tests, copy)
    finally:
        path.write_text(text)


def ended(tests: str, names: str, copy: Path) -> str:
    """How tests end in the copy as it is: killed if one fails, all crash or they run too long."""
    process = multiprocessing.Process(target=run, args=(copy, tests, names))
    process.start()
    process.join(LONGEST)
    if process.is_alive():
        process.kill()
        process.join()
    status = process.exitcode or 0
    return "killed" if status < 0 else RESULTS.get(status, f"the tests ended with status {status}")


if __name__ == "__main__":
    sys.exit(main())
