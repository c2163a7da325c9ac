"""trackio, on this machine alone: what `report_to="trackio"` stored of a training."""

import os
from collections.abc import Iterator
from tempfile import TemporaryDirectory

from tools.trainers.comparing import Result, compare
from tools.trainers.huggingface import tracked


def results() -> Iterator[Result]:
    with TemporaryDirectory() as folder:
        os.environ["TRACKIO_DIR"] = folder  # read when it is imported
        yield compare("what `report_to` stored, statistics included", tracked("trackio", read))


def read(run: str, metric: str) -> list[float]:
    from trackio.sqlite_storage import SQLiteStorage

    return [entry[metric] for entry in SQLiteStorage.get_logs("huggingface", run) if metric in entry]
