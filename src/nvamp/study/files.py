"""Files that are written completely or not at all, one that a single process holds, and names on one line."""

import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime
from pathlib import Path
from typing import IO

from nvamp.study import StudyError

try:
    import fcntl
except ImportError:  # no such locks on Windows
    fcntl = None  # type: ignore[assignment]


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


def hold(path: Path) -> IO[str]:
    """Open a file that says who holds it, and hold it until it is closed or the process ends.

    On a file system without locks nothing is held.

    Raises:
        StudyError: another process holds it.
        OSError: it cannot be written.
    """
    with ExitStack() as stack:
        file = stack.enter_context(path.open("a+", encoding="utf-8"))
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read() or "another process"
            raise StudyError(f"{path.parent} is in use by {holder}") from None
        except OSError:  # some network file systems
            pass
        file.truncate(0)
        now = datetime.now().astimezone().isoformat(" ", "seconds")
        file.write(f"process {os.getpid()} on {platform.node()}, since {now}")
        file.flush()
        stack.pop_all()
    return file


def visible(name: str) -> str:
    """A name on one line: characters that are invisible, or change how others look, become their numbers."""
    return "".join(c if c.isprintable() else f"⟨U+{ord(c):04X}⟩" for c in name)
