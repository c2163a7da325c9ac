"""The text of a study: files and directories, or the standard library."""

import os
import random
import re
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from enum import Enum
from pathlib import Path
from typing import TypeVar

from nvamp.study import StudyError
from nvamp.study.files import visible
from nvamp.study.rows import FORMATS, ending
from nvamp.study.store import is_study

T = TypeVar("T")
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
NAMED = 3  # so many of the files that are not read are named
# The pages of `nvamp compare` and `nvamp inspect`.
_PAGE = re.compile(r"<!doctype html>.{,1000}<title>nvamp (compare|inspect): ", re.DOTALL)


def read_documents(text: Sequence[str], out: Path | None = None) -> tuple[list[str], str]:
    """Read files and directories, or without any the source of the standard library.

    Args:
        text: files and directories.
        out: a directory that is not read, as if it were a study's.

    Returns:
        The documents, always shuffled into the same order and cut to `MAX_CHARACTERS` in total; and what
        they are, in words, with the files that were not read.

    Raises:
        StudyError: there is no text to read.
    """
    if "" in text:
        raise StudyError("--text: expected a name, got an empty one")
    if text:
        return _read_paths(text, out)
    version = sysconfig.get_python_version()
    return _read_standard_library(), f"the standard library source of Python {version}"


def shuffled(items: list[T]) -> list[T]:
    """The items in an order that is always the same; it is the list itself."""
    random.Random(0).shuffle(items)
    return items


def bounded(documents: Iterable[str]) -> list[str]:
    """The documents up to `MAX_CHARACTERS` in total; what lies beyond is not asked for."""
    kept: list[str] = []
    left = MAX_CHARACTERS
    for document in documents:
        kept.append(document[:left])
        left -= len(document)
        if left <= 0:
            break
    return kept


def standard_library(root: Path) -> list[Path]:
    """The source files of the standard library in `root`, sorted, without tests and others' code."""
    return sorted(
        path for path in root.rglob("*.py") if not _NOT_SOURCE.intersection(path.relative_to(root).parts)
    )


def _read_standard_library() -> list[str]:
    root = Path(sysconfig.get_path("stdlib"))
    paths = standard_library(root)
    read = map(_read_text, shuffled(paths))
    documents = bounded(text for text in read if isinstance(text, str))
    if not documents:
        raise StudyError(f"this Python has no standard library source in {root}: name some text with --text")
    return documents


def _read_paths(names: Sequence[str], out: Path | None) -> tuple[list[str], str]:
    found = _Files(out)
    files = shuffled([(name, path) for name in names for path in found.under(name)])
    read: set[str] = set()
    reading = iter(files)

    def texts() -> Iterator[str]:
        for name, path in reading:
            if text := found.text(path):
                read.add(name)
                yield text

    documents = bounded(texts())
    beyond = list(reading)
    for name in names:
        # Each name must have some text, within the limit or beyond it.
        if name not in read and not any(found.text(path) for of, path in beyond if of == name):
            raise StudyError(f"--text {name}: {found.why_not(name)}")
    notes = list(filter(None, [found.unread("not read: ")]))
    if beyond:
        notes.append(f"{len(beyond):,} more lie beyond {MAX_CHARACTERS:,} characters")
    source = ", ".join(names)
    if notes or len(documents) > len(names):
        count = f"{len(documents):,} file{'s' if len(documents) > 1 else ''} read"
        source += f" ({'; '.join([count, *notes])})"
    return documents, source


class Unread(Enum):
    """Why a file is not read."""

    HIDDEN = "hidden"
    OWN = "written by nvamp"
    BINARY = "binary"
    ENCODING = "not UTF-8"
    ERROR = "unreadable"


class _Files:
    """Finds and reads the files of `--text`, and remembers which it did not read.

    Args:
        out: a directory that holds a study, or is about to.
    """

    def __init__(self, out: Path | None) -> None:
        self._unread: dict[Unread, dict[Path, None]] = {}
        self._study = {out.resolve(): True} if out else {}

    def under(self, name: str) -> list[Path]:
        """The files to read for a name, in order: a file itself, or those in a directory."""
        path = Path(name)
        if not path.exists():
            raise StudyError(f"--text {name}: no such file or directory")
        if self._in_study(path.resolve()):
            raise StudyError(f"--text {name}: in the directory of a study, which is no text to train on")
        if path.is_dir():
            return sorted(self._walk(path))
        if FORMATS.get(ending(path), FORMATS[".txt"]) != FORMATS[".txt"]:
            raise StudyError(f"--text {name}: expected text, got rows, which --dataset takes")
        return [path]

    def _walk(self, root: Path) -> Iterator[Path]:
        for top, directories, files in os.walk(root, onerror=self._not_listed):
            here = Path(top)
            for name in [*directories]:
                if unread := self._why_skipped(here / name):
                    self._leave(here / name, unread)
                    directories.remove(name)
            for name in files:
                if unread := self._why_skipped(here / name):
                    self._leave(here / name, unread)
                else:
                    yield here / name

    def _why_skipped(self, path: Path) -> Unread | None:
        """Why a file or directory in a directory is not even opened; `None` if it is."""
        if path.name.startswith(".") or path.name == "__pycache__":
            return Unread.HIDDEN
        if not (path.is_file() or path.is_dir()):
            return Unread.ERROR
        return Unread.OWN if self._in_study(path.resolve()) else None

    def _in_study(self, path: Path) -> bool:
        """Whether a path without links is in the directory of a study, or is one."""
        for directory in (path, *path.parents):
            if directory not in self._study:
                self._study[directory] = is_study(directory)
            if self._study[directory]:
                return True
        return False

    def text(self, path: Path) -> str:
        """The text of a file; empty if it has none."""
        text = _read_text(path)
        if isinstance(text, Unread):
            self._leave(path, text)
            return ""
        return text

    def _not_listed(self, error: OSError) -> None:
        self._leave(Path(error.filename), Unread.ERROR)

    def _leave(self, path: Path, why: Unread) -> None:
        self._unread.setdefault(why, {})[path] = None

    def why_not(self, name: str) -> str:
        """Why there is no text in a file or directory, in words."""
        path = Path(name)
        if path.is_dir():
            return "no readable UTF-8 text in it" + self.unread(", not read: ")
        return next((why.value for why, paths in self._unread.items() if path in paths), "empty")

    def unread(self, before: str) -> str:
        """What was not read, in words after `before`; empty if all was."""
        kinds = [
            f"{len(paths):,} {why.value}: {', '.join(visible(path.name) for path in sorted(paths)[:NAMED])}"
            + (", ..." if len(paths) > NAMED else "")
            for why, paths in self._unread.items()
        ]
        return before + "; ".join(kinds) if kinds else ""


def _read_text(path: Path) -> str | Unread:
    """The text of a file, `MAX_CHARACTERS` at most."""
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(MAX_CHARACTERS)
    except OSError:
        return Unread.ERROR
    except UnicodeDecodeError:
        return Unread.ENCODING
    if "\0" in text:
        return Unread.BINARY
    return Unread.OWN if _PAGE.match(text) else text
