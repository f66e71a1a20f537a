"""What a program under test may use, and which of that the kernel does not keep."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields

from lightning_peft.errors import UserError


@dataclass(frozen=True)
class Limits:
    """What one program may use.

    Args:
        seconds: Wall time, and processor time rounded up, from the program's first line on.
        memory_bytes: Address space, the interpreter's some 30 MiB included.
        threads: Threads at once. There are no further processes.
        files: Files at once in the working folder, which has no folders in it.
        file_bytes: Bytes in one file, and on the disk in the whole folder.
        output_bytes: Bytes written to stdout and stderr together.
    """

    seconds: float = 10.0
    memory_bytes: int = 1 << 30
    threads: int = 32
    files: int = 64
    file_bytes: int = 16 << 20
    output_bytes: int = 1 << 20

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) <= 0:
                raise UserError(
                    f"{field.name} is {getattr(self, field.name)}; it has to be more than 0."
                )


def excess(pid: int, folder: str, output_bytes: int, limits: Limits) -> str | None:
    """Say which limit is exceeded of those that the kernel does not keep.

    Args:
        pid: The program's process.
        folder: Its working folder.
        output_bytes: What it has written to stdout and stderr so far.
        limits: What it may use.
    """
    if output_bytes > limits.output_bytes:
        return f"more than {limits.output_bytes} bytes of output"
    sizes = []
    with os.scandir(folder) as entries:
        for entry in entries:
            try:
                sizes.append(entry.stat(follow_symlinks=False).st_blocks * 512)
            except FileNotFoundError:
                continue
    if len(sizes) > limits.files:
        return f"more than {limits.files} files"
    if sum(sizes) > limits.file_bytes:
        return f"more than {limits.file_bytes} bytes in files"
    try:
        threads = len(os.listdir(f"/proc/{pid}/task"))
    except OSError:  # it has ended, or this is no Linux
        threads = 1
    return f"more than {limits.threads} threads" if threads > limits.threads else None
