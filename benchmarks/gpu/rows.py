"""The results of a part, written at once: a line of JSON for each row."""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]


class Rows:
    """The rows of a part, at the end of a file that all parts share."""

    def __init__(self, path: Path, part: str) -> None:
        self.path, self.part = path, part

    def add(self, kind: str, **fields: Any) -> None:
        line = json.dumps(_plain({"part": self.part, "kind": kind, **fields}))
        with self.path.open("a") as file:
            file.write(line + "\n")
        print(line, flush=True)  # in the log, between the output of libraries

    def timing(self, what: str, **fields: Any) -> None:
        self.add("timing", what=what, **fields)

    def check(self, what: str, measured: float, limit: float, note: str = "") -> None:
        """A condition, which fails the run if it is not met. NaN meets none."""
        self.add("check", what=what, measured=measured, limit=limit, met=measured <= limit, note=note)

    def bar(self, what: str, measured: float, limit: float, by: str) -> None:
        """A goal, met or missed, judged by this measure."""
        self.add("bar", what=what, measured=measured, limit=limit, met=measured <= limit, by=by)

    def not_run(self, what: str, why: str, ours: bool) -> None:
        """Something that did not run; if it is ours, the run fails."""
        self.add("not run", what=what, why=why, ours=ours)


def reason(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _plain(value: Any) -> Any:
    """The value as JSON can hold it, which has no NaN and no infinity."""
    if isinstance(value, dict):
        return {key: _plain(x) for key, x in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read(path: Path, start: int = 0) -> list[Row]:
    """The rows from an offset in the file. The last line of a killed process may be incomplete."""
    if not path.exists():
        return []
    with path.open("rb") as file:
        file.seek(start)
        return list(_parsed(file.read().decode(errors="replace").splitlines()))


def _parsed(lines: Iterable[str]) -> Iterable[Row]:
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and "kind" in row:
            yield row


def latest(rows: Iterable[Row]) -> list[Row]:
    """The rows that count: a contender is written after each round, and only its last row counts."""
    found: dict[tuple[Any, ...], Row] = {}
    for index, row in enumerate(rows):
        key = (row["part"], row["kind"], row["what"]) if row["kind"] == "timing" else (index,)
        found[key] = row
    return list(found.values())
