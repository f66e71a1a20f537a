"""Writing a file whole or not at all, and telling whether another process is at work on one."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None  # type: ignore[assignment]


def write_atomically(path: str | Path, write: Callable[[Path], object]) -> None:
    """Write a file beside its place, flush it to the disk, and move it there in one step.

    A reader, or a run that resumes after a crash, finds the old file or the new one, never half of
    one.

    Args:
        path: The file.
        write: Called with the path to write to, in the same folder.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write(part)
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def hold(file: IO[Any]) -> bool:
    """Keep an open file for this process, until it closes the file or ends in any way.

    Returns:
        Whether no other process holds it.
    """
    if fcntl is not None:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            return False
        except OSError:  # a file system without locks
            return True
    return True


def is_held(path: str | Path) -> bool:
    """Say whether another process that lives holds a file."""
    if fcntl is None:
        return False
    with open(path, "rb+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            return True
        except OSError:
            return False
        return False
