"""Writing a file whole or not at all, and telling whether another process is at work on one.

Every file that a run leaves goes through here, so that an error of the operating system names the
file, and nothing half-written stays behind.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from lightning_peft.errors import naming

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

    Raises:
        OSError: With the file's name, as the disk, or a library that writes for us, says it.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(part)
            with part.open("rb+") as file:
                os.fsync(file.fileno())
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a text whole, in UTF-8, as :func:`write_atomically` does."""
    write_atomically(path, lambda part: part.write_text(text, encoding="utf-8"))


def append_text(path: Path, text: str) -> None:
    """Add lines at the end of a file; a crash may leave the last one cut off."""
    with naming(path), path.open("a", encoding="utf-8", newline="") as file:
        file.write(text)


def write_folder(folder: Path, write: Callable[[Path], object], over: bool = False) -> None:
    """Write a folder beside its place and move it there in one step.

    Args:
        folder: The folder.
        write: Called with the path of an empty folder to write to.
        over: Whether one that is there and not empty gives way.

    Raises:
        OSError: As :func:`write_atomically`.
    """
    part = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    with naming(folder):
        try:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            write(part)
            if over and folder.is_dir():
                shutil.rmtree(folder)
            part.replace(folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)


def hold(file: IO[Any], shared: bool = False) -> bool:
    """Keep an open file for this process, until it closes the file or ends in any way.

    Args:
        file: Open for reading and writing.
        shared: Whether others may keep it like this at the same time.

    Returns:
        False if another process that lives keeps it already. A file system without locks keeps
        nothing, and says True.
    """
    if fcntl is None:
        return True
    try:
        fcntl.lockf(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        return True
    return True


def is_held(path: str | Path) -> bool:
    """Say whether another process that lives holds a file."""
    with open(path, "rb+") as file:
        return not hold(file)


@contextlib.contextmanager
def alone_at(path: Path) -> Iterator[None]:
    """Within, no other process changes a file that is read and written anew; one waits for it."""
    lock = path.with_name(f".{path.name}.lock")
    with naming(lock):
        file = lock.open("a+")
        while not _locked(file, lock):  # who held it has removed it meanwhile
            file.close()
            file = lock.open("a+")
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        file.close()


def _locked(file: IO[Any], path: Path) -> bool:
    """Wait until a file is this process' alone; whether its path still leads to it then."""
    if fcntl is not None:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.lockf(file, fcntl.LOCK_EX)
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
