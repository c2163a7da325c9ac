"""Changes the code in small ways, one after the other, and reports which changes no test sees.

    python -m tools.mutants [--only TEXT ...] [--minutes M]

The mutants are those of `tools/mutants/listed.py`. Each is made in a copy of the working tree, where the
tests that must fail are run. With `--minutes` they are drawn by the day's date until time is up. The exit
code is 1 if a mutant survives, or is no longer to be found in the code.
"""

import argparse
import datetime
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tools.mutants.listed import MUTANTS, Mutant

ROOT = Path(__file__).parents[2]
COPIED = ("src", "tests", "benchmarks", "tools", "docs", "examples", "pyproject.toml", "README.md")


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
    with tempfile.TemporaryDirectory() as directory:
        copy = copied(Path(directory))
        for number, mutant in enumerate(chosen, 1):
            if time.monotonic() > end:
                print(f"time is up after {number - 1} of {len(chosen)}")
                break
            result = tried(mutant, copy)
            survivors += result != "killed"
            print(f"{number}/{len(chosen)} {result}: {mutant.file}: {mutant.old.strip()!r}", flush=True)
    print(f"{survivors} not killed")
    return int(survivors > 0)


def copied(directory: Path) -> Path:
    for name in COPIED:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "results")
            shutil.copytree(ROOT / name, directory / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, directory)
    return directory


def tried(mutant: Mutant, copy: Path) -> str:
    """What became of a mutant: killed, survived, or why that is not known."""
    path = copy / mutant.file
    text = path.read_text()
    if text.count(mutant.old) != 1:
        return f"occurs {text.count(mutant.old)} times, not once"
    path.write_text(text.replace(mutant.old, mutant.new))
    try:
        status = status_of_tests(mutant, copy)
    finally:
        path.write_text(text)
    return {0: "survived", 1: "killed"}.get(status, f"pytest ended with status {status}")


def status_of_tests(mutant: Mutant, copy: Path) -> int:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--tb=no", mutant.tests]
    paths = os.pathsep.join((str(copy / "src"), str(copy)))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    selected = ["-k", mutant.names] if mutant.names else []
    return subprocess.run(
        command + selected, cwd=copy, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ).returncode


if __name__ == "__main__":
    sys.exit(main())
