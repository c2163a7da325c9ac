"""The documents of a study: files and directories, a dataset, or the standard library."""

import os
import random
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nvamp.study import StudyError

MAX_CHARACTERS = 20_000_000  # no more is read: minutes of training see a fraction of it

# Directories of the standard library that are left out: other projects' code, tests and generated tables.
# Their near-copies would end up on both sides of the split.
_NOT_SOURCE = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "encodings",
    "pydoc_data",
    "lib2to3",
    "idlelib",
}
_DATASET_FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}


def read_documents(
    text: Sequence[str], dataset: Sequence[str], out: Path | None = None
) -> tuple[list[str], str]:
    """Read files and directories, or a dataset, or else the source of the standard library.

    Args:
        text: files and directories.
        dataset: the name of a dataset, or local files of one.
        out: a directory that is skipped if it lies inside one of `text`.

    Returns:
        The documents, always shuffled into the same order and cut to `MAX_CHARACTERS` in total; and what
        they are, in words.

    Raises:
        StudyError: there is no text to read.
    """
    for option, names in (("text", text), ("dataset", dataset)):
        if "" in names:
            raise StudyError(f"--{option}: expected a name, got an empty one")
    if text:
        return _bounded(_read_paths([Path(name) for name in text], out)), ", ".join(text)
    if dataset:
        return _bounded(_read_dataset(dataset)), ", ".join(dataset)
    version = sysconfig.get_python_version()
    return _bounded(_read_standard_library()), f"the standard library source of Python {version}"


def _bounded(documents: list[str]) -> list[str]:
    random.Random(0).shuffle(documents)
    kept: list[str] = []
    left = MAX_CHARACTERS
    for document in documents:
        if left <= 0:
            break
        kept.append(document[:left])
        left -= len(document)
    return kept


def _read_standard_library() -> list[str]:
    root = Path(sysconfig.get_path("stdlib"))
    paths = sorted(
        path for path in root.rglob("*.py") if not _NOT_SOURCE.intersection(path.relative_to(root).parts)
    )
    documents = [text for path in paths if (text := _read_text(path)) is not None]
    if not documents:
        raise StudyError(f"this Python has no standard library source in {root}: name some text with --text")
    return documents


def _read_paths(paths: list[Path], out: Path | None) -> list[str]:
    documents: list[str] = []
    for path in paths:
        if not path.exists():
            raise StudyError(f"--text {path}: no such file or directory")
        found = _read_directory(path, out) if path.is_dir() else [_read_text(path)]
        texts = [text for text in found if text]
        if not texts:
            wanted = "no readable UTF-8 text in it" if path.is_dir() else "empty, or not readable UTF-8 text"
            raise StudyError(f"--text {path}: {wanted}")
        documents += texts
    return documents


def _read_directory(root: Path, out: Path | None) -> list[str | None]:
    paths = sorted(path for path in root.rglob("*") if path.is_file())
    left_out = out and out.resolve()
    return [
        _read_text(path)
        for path in paths
        if not _hidden(path.relative_to(root)) and not (left_out and path.resolve().is_relative_to(left_out))
    ]


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") or part == "__pycache__" for part in path.parts)


def _read_text(path: Path) -> str | None:
    """The text of a file; `None` if it is not text or cannot be read."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    return None if "\0" in text else text


def _read_dataset(names: Sequence[str]) -> list[str]:
    import datasets

    datasets.disable_progress_bars()
    option = f"--dataset {' '.join(names)}"
    names, column = _named_column(names)
    try:
        rows = _load_dataset(names)
        return [text for text in rows[_text_column(rows, column)] if text]
    except StudyError as error:
        raise StudyError(f"{option}: {error}") from error
    except Exception as error:  # a loader can raise any error of any library
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        nor = "" if all(map(os.path.exists, names)) else " (no such file here either)"
        raise StudyError(f"{option}: {reason}{nor}") from error


def _named_column(names: Sequence[str]) -> tuple[list[str], str]:
    """The name of each `name#column`, and the one column; empty if no column is named."""
    parts = [(name, "") if os.path.exists(name) else name.partition("#")[::2] for name in names]
    columns = sorted({column for _, column in parts if column})
    if len(columns) > 1:
        raise StudyError(f"--dataset {' '.join(names)}: expected one column, got {', '.join(columns)}")
    return [name for name, _ in parts], "".join(columns)


def _load_dataset(names: Sequence[str]) -> Any:
    from datasets import load_dataset

    if all(Path(name).is_file() for name in names):
        suffixes = {Path(name).suffix for name in names}
        formats = {_DATASET_FORMATS.get(suffix) for suffix in suffixes}
        if len(formats) != 1 or None in formats:
            raise StudyError(f"expected files of one format, of {', '.join(_DATASET_FORMATS)}")
        return load_dataset(formats.pop(), data_files=list(names), split="train")
    if len(names) > 1:
        missing = ", ".join(name for name in names if not Path(name).is_file())
        raise StudyError(f"expected one dataset, or local files; no such file: {missing}")
    name, _, configuration = names[0].partition(":")
    return load_dataset(name, configuration or None, split="train")


def _text_column(rows: Any, wanted: str) -> str:
    """The column of strings to read: `wanted`, or if that is empty "text", or the only one."""
    columns = [
        name
        for name, feature in rows.features.items()
        if getattr(feature, "dtype", "") in ("string", "large_string")
    ]
    if not columns:
        raise StudyError(f"no text column among {', '.join(rows.features)}")
    if wanted and wanted not in columns:
        raise StudyError(f"no text column {wanted!r}, the text columns are {', '.join(columns)}")
    if not wanted and "text" not in columns and len(columns) > 1:
        raise StudyError(
            f"several text columns: {', '.join(columns)}; append the one to read, as in #{columns[0]}"
        )
    return wanted or ("text" if "text" in columns else columns[0])
