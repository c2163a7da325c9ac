"""Runs in the environment of a trainer, and writes what it found to a file.

python -m tools.trainers.inside NAME FILE
"""

import importlib
import json
import re
import sys
from importlib.metadata import version
from pathlib import Path

from tools.trainers.recipes import RECIPES


def main() -> None:
    name, file = sys.argv[1:]
    results = [
        result._asdict() | {"agrees": result.agrees}
        for result in importlib.import_module(f"tools.trainers.{name}").results()
    ]
    (package, *_) = re.split("[=<>]", RECIPES[name].package)
    versions = {package: version(package), "torch": version("torch")}
    Path(file).write_text(json.dumps({"versions": versions, "results": results}), encoding="utf-8")


if __name__ == "__main__":
    main()
