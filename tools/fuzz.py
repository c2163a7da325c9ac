"""Draws examples for every property test of the engine and the losses until time is up.

    python -m tools.fuzz [--seconds 3600] [--seed SEED]

It works in rounds. Each has its own seed, one more than the last, and ends with a line that reports the seed
and the number of examples that passed. The first failure ends the run with exit code 1; `--seed` with the
seed of that round reproduces it.
"""

import argparse
import os
import random
import re
import sys
import time

EXAMPLES = 5  # times as many as in `make test`: a round takes a minute or two
FILES = [
    "tests/test_properties.py",
    "tests/test_objective.py",
    "tests/test_losses.py",
    "tests/engine/test_parts.py",
]


class Count:
    """The number of examples that passed in the property tests of a pytest run."""

    total = 0

    def pytest_runtest_teardown(self, item: object) -> None:
        statistics = getattr(item, "hypothesis_statistics", "")
        self.total += sum(map(int, re.findall(r"- (\d+) passing, ", statistics)))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--seed", type=int, default=random.randrange(10**9))
    arguments = parser.parse_args()
    os.environ["NVAMP_FUZZ"] = str(EXAMPLES)
    import pytest

    started, seed, count = time.monotonic(), arguments.seed, Count()
    while True:
        code = pytest.main(
            [
                "-q",
                "-m",
                "hypothesis",
                "--timeout=0",
                "-p",
                "no:cacheprovider",
                f"--hypothesis-seed={seed}",
                *FILES,
            ],
            plugins=[count],
        )
        spent = time.monotonic() - started
        if code:
            print(f"fuzz: failed after {count.total} examples; to repeat: python -m tools.fuzz --seed {seed}")
            return 1
        print(f"fuzz: seed {seed} done, {count.total} examples in {spent:.0f} s", flush=True)
        if spent > arguments.seconds:
            print(f"fuzz: seeds {arguments.seed} to {seed}, {count.total} examples, no failure")
            return 0
        seed += 1


if __name__ == "__main__":
    sys.exit(main())
