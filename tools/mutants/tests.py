"""The tests that must see a mutant, run in a process of their own."""

import os
import sys
from pathlib import Path

import pytest

RESULTS = {100: "survived", 101: "killed"}


def run(copy: Path, tests: str, names: str) -> None:
    """Ends this process with 100 + pytest's exit code for a file of tests in a copy of the working tree."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    os.dup2(nothing, 2)
    for module in [name for name in sys.modules if name.split(".")[0] in ("nvamp", "tests", "tools")]:
        del sys.modules[module]  # of the working tree itself
    paths = [str(copy / "src"), str(copy)]
    sys.path[:0] = paths
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)  # for the processes that tests start
    os.chdir(copy)
    options = [
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "--tb=no",
        "-W",
        "ignore::pytest.PytestAssertRewriteWarning",
    ]
    sys.exit(100 + pytest.main([*options, tests, *(["-k", names] if names else [])]))
