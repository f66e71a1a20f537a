"""Where a command works: the checkpoint that it takes, and the folder that it writes to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_peft.errors import MissingFile
from lightning_peft.runs.checkpoints import check_checkpoint, read_checkpoint
from lightning_peft.runs.finding import find_restart, newest
from lightning_peft.runs.folders import (
    RunFolder,
    belongs_to_run,
    claim_folder,
    folder_of,
    interrupted_test,
    is_first_process,
    next_folder,
)


@dataclass
class Place:
    """Where a command works.

    Attributes:
        folder: Where its files go; nothing is written there by ``validate`` and a trial.
        checkpoint: What it takes its weights from, if anything.
        settings: Under which that was trained; None where only Python's words said them.
        held: The folder as this process holds it; None in others than the first of a job.
    """

    folder: Path
    checkpoint: Path | None = None
    settings: dict[str, Any] | None = None
    held: RunFolder | None = None

    def give_up(self) -> None:
        """Remove what a start has made that came to nothing."""
        if self.held is not None:
            self.held.give_up()

    def release(self) -> None:
        """Let others work there."""
        if self.held is not None:
            self.held.release()


def find_place(command: str, root: str | Path, given: str | None, trial: bool = False) -> Place:
    """Find the checkpoint, and claim the folder or hold that of the run.

    Args:
        command: ``fit``, ``validate``, ``test`` or ``predict``.
        root: The trainer's ``default_root_dir``.
        given: ``last``, a checkpoint's path, or None.
        trial: Whether nothing is kept (``fast_dev_run``).

    Returns:
        The place; a fit holds its run's folder alone, tests of a run share it.

    Raises:
        MissingFile: If there is no such checkpoint.
        UserError: If it is damaged, or another process is at work in the run's folder.
        OSError: If a folder cannot be made.
    """
    fits, writes = command == "fit", command != "validate" and not trial
    path, settings = _checkpoint(given, root)
    again = find_restart(root, path) if fits else path
    if again is not None and again != path:
        path, settings = _checkpoint(str(again), root)
    first = writes and is_first_process()
    if path is not None and (fits or belongs_to_run(path)):
        folder, before = folder_of(path), _files(path)
        held = RunFolder(folder, shared=not fits) if first else None
        if given == "last" and _files(path) != before:  # its process has ended meanwhile
            path, settings = _checkpoint("last", folder)
        return Place(folder, path, settings, held)
    cut_off = None if fits else interrupted_test(root)
    if not first:
        return Place(cut_off or next_folder(root), path, settings)
    held = RunFolder(cut_off) if cut_off else claim_folder(root)
    return Place(held.path, path, settings, held)


def _checkpoint(given: str | None, root: str | Path) -> tuple[Path | None, Any]:
    """The checkpoint that a command names, if it can be taken, and the settings in it.

    It is read here, so that a damaged one is told before a large model is loaded.
    """
    if not given:
        return None, None
    if given == "last":
        path, content = newest(root)
    else:
        path = Path(given)
        if not path.is_file():
            raise MissingFile(f"ckpt_path: {path} does not exist.")
        content = check_checkpoint(read_checkpoint(path), path)
    return path, content.get("settings")


def _files(path: Path) -> list[tuple[str, Any]]:
    return sorted((p.name, p.lstat().st_mtime_ns) for p in path.parent.glob("*.ckpt"))
