"""Files that are written completely or not at all."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nvamp.study import StudyError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path for a file or directory, which replaces `path` once it is complete.

    Raises:
        StudyError: it cannot be written; anything that was at `path` is still there.
    """
    temporary = path.with_name(path.name + ".part")
    try:
        remove(temporary)
        yield temporary
        if temporary.is_dir():
            remove(path)
        temporary.replace(path)
    except OSError as error:
        raise StudyError(f"{path}: {error.strerror or error}") from error
    finally:
        remove(temporary)


def remove(path: Path) -> None:
    """Remove a file, a link or a directory, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
