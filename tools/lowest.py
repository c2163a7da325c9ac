"""Runs tests with the lowest versions that pyproject.toml allows.

    python -m tools.lowest [--any-build]

It makes its own environment in runs/lowest, with the lowest Python if that is installed. It takes the CPU
build of the lowest PyTorch if pip's index has one (PIP_EXTRA_INDEX_URL adds an index), or with --any-build
the CUDA build of several gigabytes. If there is none, it prints a line that names what was not checked and
goes on with the PyTorch of constraints.txt.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import tomllib  # type: ignore[import-not-found]  # this tool needs Python 3.11

WHERE = Path("runs/lowest")
CORE = [
    "test_losses.py",
    "test_objective.py",
    "test_transforms.py",
    "test_properties.py",
    "test_saving.py",
    "test_steady_state.py",
    "engine",
    "test_distributed.py",
    "test_sharded.py",
]
ABOVE = ["integrations/test_patch.py", "study", "test_cli.py"]
TOOLS = ["hypothesis", "pytest", "pytest-timeout", "triton"]


def lowest(requirement: str) -> str:
    """The lowest minor version that `name>=version` allows."""
    name, version = re.fullmatch(r"([\w-]+)>=([\d.]+).*", requirement).groups()  # type: ignore[union-attr]
    return f"{name}=={version}.*"


def works(python: str) -> bool:
    """Whether the program runs; a version manager's stub may exist without the program itself."""
    return (
        shutil.which(python) is not None
        and subprocess.run([python, "-V"], capture_output=True).returncode == 0
    )


def environment(python: str) -> Path:
    """Makes a new environment and returns its Python."""
    shutil.rmtree(WHERE, ignore_errors=True)
    subprocess.run([python, "-m", "venv", WHERE], check=True)
    return WHERE / "bin/python"


def obtainable(python: Path, requirement: str) -> bool:
    """Whether pip would install it. pip downloads at most a wheel's metadata."""
    pip = [str(python), "-m", "pip", "install", "--quiet", "--dry-run", "--no-deps", requirement]
    return subprocess.run(pip, capture_output=True).returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--any-build", action="store_true")
    any_build = parser.parse_args().any_build
    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    pinned = dict(
        line.split("==") for line in Path("constraints.txt").read_text().splitlines() if "==" in line
    )
    oldest = "python" + project["requires-python"].removeprefix(">=")
    (torch,) = (r.removeprefix("torch>=") for r in project["dependencies"] if r.startswith("torch>="))
    of_lowest = [f"{torch}.0+cpu", *([f"{torch}.0"] if any_build else [])]
    builds = [*of_lowest, f"{pinned['torch']}+cpu"]
    kind = "build" if any_build else "CPU build"

    chosen = None
    if not works(oldest):
        print(f"lowest: {oldest} is not installed and was not checked")
    else:
        subprocess.run([oldest, "-c", COMPILE], check=True)
        python = environment(oldest)
        chosen = next((build for build in builds if obtainable(python, f"torch=={build}")), None)
        if chosen is None:
            print(f"lowest: no {kind} of torch for {oldest}: checked only that it compiles the source")
    if chosen is None:
        python = environment(sys.executable)
        chosen = next((build for build in builds if obtainable(python, f"torch=={build}")), pinned["torch"])
    if chosen not in of_lowest:
        print(f"lowest: no {kind} of torch {torch}: not checked; the rest uses torch {chosen}", flush=True)

    extras = project["optional-dependencies"]
    peft = [r for r in extras["dev"] if r.startswith("peft")]
    versions = [
        f"torch=={chosen}",
        *map(lowest, [*extras["study"], *peft]),
        *TOOLS,
    ]
    print("lowest:", *versions, flush=True)
    subprocess.run([python, "-m", "pip", "install", "--quiet", *versions, "--editable", "."], check=True)
    files = [f"tests/{name}" for name in (*(CORE if chosen in of_lowest else []), *ABOVE)]
    # Old versions warn about one another.
    tests = ["-m", "pytest", "-q", "-W", "default", "-p", "no:cacheprovider", *files]
    return subprocess.run(
        [str(python), *tests, "--ignore", "tests/study/inspect/test_browser.py"],
        env={**os.environ, "PATH": f"{WHERE.resolve() / 'bin'}:{os.environ['PATH']}"},
    ).returncode


COMPILE = """
from pathlib import Path
for path in Path("src").rglob("*.py"):
    compile(path.read_text(), str(path), "exec")
"""

if __name__ == "__main__":
    sys.exit(main())
