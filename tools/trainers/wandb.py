"""Weights & Biases, offline: what `report_to="wandb"` wrote of a training into the run's file."""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from tools.trainers.comparing import Result, compare
from tools.trainers.huggingface import tracked

BLOCK = 32768  # of LevelDB's log format, in which the file is


def results() -> Iterator[Result]:
    with TemporaryDirectory() as folder:
        os.environ |= {"WANDB_MODE": "offline", "WANDB_DIR": folder, "WANDB_SILENT": "true"}
        yield compare("what `report_to` stored, statistics included", tracked("wandb", read))


def read(run: str, metric: str) -> list[float]:
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record

    wandb.finish()
    file = max(Path(os.environ["WANDB_DIR"]).rglob("run-*.wandb"), key=lambda path: path.stat().st_mtime_ns)
    for _ in range(300):  # another process writes it, sometimes after `finish`
        found = [Record.FromString(data) for data in records(file.read_bytes())]
        if found and found[-1].HasField("exit"):
            break
        time.sleep(0.1)
    items = [item for record in found for item in record.history.item]
    return [float(json.loads(item.value_json)) for item in items if metric in item.nested_key]


def records(data: bytes) -> Iterator[bytes]:
    """The records of a file; a fragment is a checksum (4 bytes), a length (2), a kind (1) and content."""
    position, record = 7, b""  # after the file's own header
    while position + 7 <= len(data):
        left = BLOCK - position % BLOCK
        if left < 7:
            position += left
            continue
        length, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        record += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or its last fragment
            yield record
            record = b""
