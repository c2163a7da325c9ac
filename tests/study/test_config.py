from pathlib import Path

import pytest

from nvamp.study import StudyError
from nvamp.study.config import read_config, write_config


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "study.toml"
    fields = {"losses": ("ce", "nvamp"), "batch_size": 8, "lr": 1e-5, "model": 'a "b" \\', "text": ()}
    write_config({**fields, "bf16": True, "lora": None, "gradient_checkpointing": False}, path)
    known = ["loss", "batch-size", "lr", "model", "bf16"]
    assert read_config(path, known) == {
        "loss": ["ce", "nvamp"],
        "batch-size": 8,
        "lr": 1e-5,
        "model": 'a "b" \\',
        "bf16": True,
    }
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"stepz = 3", "unknown key 'stepz', known are loss, steps"),
        (b"steps = ", "Invalid value"),
        (b'steps = "\n"', "Illegal character"),
        (b"\xff", "'utf-8' codec can't decode"),
    ],
)
def test_a_file_that_is_none(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "study.toml"
    path.write_bytes(content)
    with pytest.raises(StudyError) as error:
        read_config(path, ["loss", "steps"])
    assert str(error.value).startswith(f"--config {path}: {message}")
    assert "\n" not in str(error.value)
