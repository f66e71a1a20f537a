"""A run's folder: claimed by making it, and held as long as the run lives."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
from pathlib import Path
from typing import IO, Any

from lightning_peft.atomic import hold, is_held
from lightning_peft.errors import UserError, naming

LOCK = ".lock"
# As launchers other than torchrun say it; a process that none of them has started is the first.
_RANKS = ("NODE_RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")


class RunFolder:
    """A run's folder while a command works in it.

    The first process of a job holds it, so that no other job writes there at the same time.

    Args:
        path: The folder; made if it is not there.
        shared: Whether others may work there in the same way, as tests of one run do.
        made: Folders that exist only since it was claimed, itself first.

    Raises:
        UserError: If another process is at work there.
    """

    def __init__(self, path: Path, shared: bool = False, made: list[Path] | None = None) -> None:
        self.path, self.made = path, made or []
        with naming(path):
            path.mkdir(parents=True, exist_ok=True)
            self._lock: IO[str] = (path / LOCK).open("a+")
        if not hold(self._lock, shared):
            self._lock.seek(0)
            owner = self._lock.read().strip() or "another process"
            self._lock.close()
            raise UserError(
                f"the run in {path} is at work in {owner}; wait until it has ended, or begin a new "
                "run without --ckpt_path."
            )
        if not shared:
            owner = f"process {os.getpid()} on {socket.gethostname()}\n"
            with contextlib.suppress(OSError):  # a full disk, which a file that matters will tell
                self._lock.truncate(0)
                os.write(self._lock.fileno(), owner.encode())

    def release(self) -> None:
        """Let others work there."""
        self._lock.close()

    def give_up(self) -> None:
        """Remove what claiming made, for a start that came to nothing."""
        self.release()
        for path in self.made:
            if path == self.path and not any(path.glob("checkpoints/*")):
                shutil.rmtree(path, ignore_errors=True)
            elif path.is_dir() and not any(path.iterdir()):
                path.rmdir()


def is_first_process() -> bool:
    """Whether this is the first process of its job, as far as launchers tell it."""
    names = ("RANK",) if "RANK" in os.environ else _RANKS
    return all(os.environ.get(name, "0") == "0" for name in names)


def next_folder(root: str | Path) -> Path:
    """The folder of a new run under a root: ``version_N`` with the first N above those there."""
    return Path(root).absolute() / f"version_{max(versions(root), default=-1) + 1}"


def claim_folder(root: str | Path) -> RunFolder:
    """Make the folder of a new run, which no other process gets.

    Args:
        root: The trainer's ``default_root_dir``.

    Returns:
        The folder, held.

    Raises:
        OSError: If folders cannot be made there.
    """
    while True:
        folder = next_folder(root)
        made = [path for path in (folder, *folder.parents) if not path.exists()]
        with naming(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            try:
                folder.mkdir()
            except FileExistsError:  # another process was faster
                if folder.is_dir():
                    continue
                raise
        return RunFolder(folder, made=made)


def interrupted_test(root: str | Path) -> Path | None:
    """The newest folder under a root, if it holds a test that was cut off, and nothing else.

    A test of a checkpoint uses the folder of the checkpoint's run and is found there anyway.
    """
    folder = Path(root).absolute() / f"version_{max(versions(root), default=-1)}"
    parts = [p for p in folder.glob("predictions/*.part*") if not p.name.startswith(".")]
    own = not (folder / "config.yaml").exists() and not (folder / "checkpoints").exists()
    held = map(is_held, [*parts, *folder.glob(LOCK)])
    return folder if parts and own and not any(held) else None


def versions(root: str | Path) -> list[int]:
    """The numbers that names of runs under a root hold, also of what only bears such a name."""
    path = Path(root)
    names = [entry.name for entry in os.scandir(path)] if path.is_dir() else []
    return [int(found[1]) for name in names if (found := re.fullmatch(r"version_(\d+)", name))]


def folder_of(checkpoint: str | Path) -> Path:
    """The folder of the run that wrote a checkpoint."""
    parent = Path(checkpoint).absolute().parent
    return parent.parent if parent.name == "checkpoints" else parent


def belongs_to_run(checkpoint: str | Path) -> bool:
    """Whether a checkpoint lies in the folder of a run of ours, where its results belong."""
    return (folder_of(checkpoint) / "config.yaml").is_file()


def run_folder(trainer: Any) -> Path | None:
    """Where a run leaves its files: the first logger's folder, or the trainer's root.

    It is a broadcast: all processes call it.

    Args:
        trainer: Lightning's.

    Returns:
        The folder; None for ``fast_dev_run``, which leaves nothing.
    """
    folder = trainer.log_dir
    return None if trainer.fast_dev_run else Path(folder or trainer.default_root_dir)
