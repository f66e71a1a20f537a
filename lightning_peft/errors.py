"""What a user got wrong, or the machine refused, said in one sentence."""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class UserError(ValueError):
    """Something that the user gave and can change: a key, a value, a file.

    The message is one sentence: what was given, what is wrong with it, what would do. The command
    line prints it without a traceback; every other exception is a bug and keeps its traceback.
    """

    def __str__(self) -> str:
        """The sentence, in one line: what is unprintable in a name is escaped."""
        text = str(self.args[0]) if self.args else ""
        return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


class MissingFile(UserError, FileNotFoundError):
    """A file or folder that the user named, or a command needs, and that is not there."""


def shown(value: Any, most: int = 80) -> str:
    """A value that somebody gave, for a sentence: as Python writes it, cut where it is long.

    Args:
        value: Any.
        most: Characters.
    """
    text = repr(value)
    return text if len(text) <= most else f"{text[: most - 1]}…"


def named(name: Any, most: int = 200) -> str:
    """A name that somebody gave, for a sentence: bare where a reader sees where it ends.

    Args:
        name: A key, a field, a tensor's name.
        most: Characters.
    """
    text = str(name)
    plain = text.isprintable() and text == text.strip() and 0 < len(text) <= most
    return text if plain else shown(name, most)


_REMEDIES = {
    errno.ENOSPC: "free some space; a run goes on with --ckpt_path last",
    errno.EDQUOT: "free some space; a run goes on with --ckpt_path last",
    errno.EROFS: "give a folder that can be written",
    errno.EACCES: "give one that this user may read and write",
    errno.EPERM: "give one that this user may read and write",
    errno.ENAMETOOLONG: "give a shorter name",
    errno.ENOTDIR: "a file stands where a folder should be; give another folder",
    errno.EEXIST: "a file stands where a folder should be; give another folder",
    errno.EISDIR: "a folder stands where a file should be; give a file",
    errno.ELOOP: "its links lead in a circle; give another path",
    errno.ENOENT: "it is not there, or was removed meanwhile",
    errno.ESTALE: "it was removed meanwhile",
    errno.EIO: "the disk, or the network to it, has failed",
    errno.ENOTEMPTY: "give a new folder",
    errno.EFBIG: "files of this size are not allowed here; raise the limit (ulimit -f)",
    errno.EMFILE: "too many files are open; raise the limit (ulimit -n)",
}


def of_system(error: OSError) -> UserError | None:
    """What the operating system refused, as a sentence with path and reason.

    Args:
        error: As raised.

    Returns:
        The sentence; None for an error that is no file's.
    """
    if error.filename is None or error.errno not in _REMEDIES:
        return None
    path = os.fsdecode(error.filename) if isinstance(error.filename, (str, bytes)) else "a file"
    shown = path if len(path) <= 300 else f"{path[:140]} … {path[-140:]}"
    return UserError(f"{shown}: {os.strerror(error.errno)}; {_REMEDIES[error.errno]}.")


@contextlib.contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Within, an error of the operating system is about a file, and says so.

    A full disk is told by the call that writes, which knows no name; libraries that write through
    code of their own (torch, safetensors) raise errors of other types, which hold its words at
    best.

    Args:
        path: The file.

    Raises:
        OSError: With the file's name.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = os.fspath(path)
        raise
    except Exception as error:
        number = _number_in(error)
        if number is None:
            raise
        raise OSError(number, os.strerror(number), os.fspath(path)) from error


def _number_in(error: BaseException | None) -> int | None:
    """The number of the system's error behind a library's.

    safetensors says it, ``(os error 28)``; torch raises another error while it handles the first.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return error.errno
        if found := re.search(r"\(os error (\d+)\)", str(error)):
            return int(found[1])
        error = error.__context__
    return None
