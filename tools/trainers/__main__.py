"""Runs real trainers on a tiny model with the losses of nvamp, and compares with their own cross-entropy.

    python -m tools.trainers NAME ...
    python -m tools.trainers --list
    python -m tools.trainers --table

Each trainer gets an environment of its own in runs/trainers/NAME, because their pins conflict: a gigabyte or
two, made once. It takes the PyTorch of constraints.txt; if pip's index has no CPU build of that,
PIP_EXTRA_INDEX_URL adds one. Each result is a line. The exit code is 1 if a trainer could not be installed,
failed or disagreed. benchmarks/results/trainers.json keeps what agreed, which `--table` prints as
docs/trainers-reference.md has it.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tools.trainers.comparing import LIMIT
from tools.trainers.recipes import RECIPES, Recipe

RECORD = Path("benchmarks/results/trainers.json")


def environment(name: str, recipe: Recipe) -> Path:
    """The Python of a trainer's environment, which is made unless it is there."""
    folder = Path("runs/trainers", name)
    python, made, constraints = folder / "bin/python", folder / "made.txt", folder / "constraints.txt"
    if made.exists() and made.read_text() == repr(recipe):
        return python
    print(f"{name}: making {folder}", flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
    pins = Path("constraints.txt").read_text(encoding="utf-8").splitlines()
    (torch,) = (pin for pin in pins if pin.startswith("torch=="))
    constraints.write_text(torch)

    def pip(*what: str) -> None:
        install: list[str | Path] = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*install, "--constraint", constraints, *what], check=True)

    pip(torch, *recipe.build.split())
    pip(*recipe.needs.split(), *([recipe.package] if recipe.complete else []))
    if not recipe.complete:
        pip("--no-deps", *(["--no-build-isolation"] if recipe.build else []), recipe.package)
    made.write_text(repr(recipe))
    return python


def run(name: str) -> dict[str, Any]:
    """The versions and the results of a trainer.

    Raises:
        subprocess.CalledProcessError: it could not be installed, or failed.
    """
    python = environment(name, RECIPES[name])
    found = Path("runs/trainers", name, "found.json")
    here = Path.cwd()
    env = {
        **os.environ,
        "PYTHONPATH": f"{here / 'src'}:{here}",
        "PATH": f"{python.parent.resolve()}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    with open(found.with_name("output.txt"), "w") as output:
        command: list[str | Path] = [python, "-m", "tools.trainers.inside", name, found]
        subprocess.run(command, check=True, env=env, stdout=output, stderr=subprocess.STDOUT)
    return dict(json.loads(found.read_text(encoding="utf-8")))


def line(result: Mapping[str, Any]) -> str:
    """A result for the reader."""
    weights = "" if result["weights"] is None else f", weights to {result['weights']:.0e}"
    verdict = "agrees" if result["limit"] == LIMIT else f"is another loss, within {result['limit']:g}"
    if not result["agrees"]:
        verdict = "DISAGREES"
    return (
        f"{result['what']}: {verdict}; losses to {result['losses']:.0e}{weights}; "
        f"NVAMP is another loss, by {result['nvamp']:.2f}"
    )


def table(record: Mapping[str, Any]) -> str:
    """What docs/trainers-reference.md lists."""
    lines = ["| command | version | what trained | losses | weights |", "|---|---|---|---|---|"]
    for name, found in record.items():
        package, version = next(iter(found["versions"].items()))
        for result in found["results"]:
            weights = "" if result["weights"] is None else f"{result['weights']:.0e}"
            lines.append(
                f"| `python -m tools.trainers {name}` | {package} {version} | {result['what']} "
                f"| {result['losses']:.0e} | {weights} |"
            )
    return "\n".join(lines)


def recorded() -> dict[str, Any]:
    """The versions and results that agreed, by name."""
    return dict(json.loads(RECORD.read_text(encoding="utf-8"))) if RECORD.exists() else {}


def keep(name: str, found: Mapping[str, Any]) -> None:
    record = recorded() | {name: found}  # read again: another trainer may have run at the same time
    ordered = {key: record[key] for key in RECIPES if key in record}
    RECORD.write_text(json.dumps(ordered, indent=2) + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--list", action="store_true", help="print the names and what they install")
    parser.add_argument("--table", action="store_true", help="print the record as the documentation has it")
    args = parser.parse_args()
    if unknown := [name for name in args.names if name not in RECIPES]:
        parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(RECIPES)}")
    if args.list:
        print(*(f"{name:14} {recipe.package}" for name, recipe in RECIPES.items()), sep="\n")
    failed = False
    for name in args.names:
        try:
            found = run(name)
        except subprocess.CalledProcessError as error:
            failed = True
            print(f"{name}: failed, see runs/trainers/{name}/output.txt: {error}", flush=True)
            continue
        package, version = next(iter(found["versions"].items()))
        for result in found["results"]:
            print(f"{package} {version}: {line(result)}", flush=True)
        if all(result["agrees"] for result in found["results"]):
            keep(name, found)
        else:
            failed = True
    if args.table:
        print(table(recorded()))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
