"""Which checkpoint a command goes on from."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from lightning_peft.errors import MissingFile
from lightning_peft.runs.checkpoints import check_checkpoint, read_checkpoint, step_of
from lightning_peft.runs.folders import folder_of, versions


def find_last(root: str | Path) -> Path:
    """The newest checkpoint that training can go on from, of the newest run that has any.

    Args:
        root: The trainer's ``default_root_dir``, or a run's own folder.

    Returns:
        The checkpoint's path.

    Raises:
        MissingFile: If there is none.
    """
    return newest(root)[0]


def newest(root: str | Path) -> tuple[Path, dict[str, Any]]:
    """The path of the newest checkpoint that training can go on from, and what it holds.

    One that is damaged, or no checkpoint of ours, is named in a warning, and the one before it
    serves.

    Args:
        root: The trainer's ``default_root_dir``, or a run's own folder.

    Raises:
        MissingFile: If there is none.
    """
    root = Path(root)
    folders = [root, *(root / f"version_{n}" for n in sorted(versions(root), reverse=True))]
    for folder in folders:
        files = sorted(folder.glob("checkpoints/*.ckpt"), key=_age, reverse=True)
        for path in files:
            try:
                return path, check_checkpoint(read_checkpoint(path), path)
            except (ValueError, OSError) as error:
                rank_zero_warn(str(error))
    raise MissingFile(f"ckpt_path: last was given, but no run under {root} has a checkpoint.")


def _age(path: Path) -> tuple[int, float]:
    try:
        return step_of(path), path.stat().st_mtime
    except OSError:  # a link that leads nowhere, which reading it will say
        return step_of(path), 0.0


def find_restart(root: str | Path, given: Path | None) -> Path | None:
    """Where a job goes on that torchrun has started again, with the same command.

    Args:
        root: The trainer's ``default_root_dir``.
        given: The checkpoint that the command names.

    Returns:
        The newest checkpoint that the job's earlier starts have written; ``given`` where there is
        none, or nothing was started again. A run that was there before the job is not taken up.
    """
    if not int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)):
        return given
    if given is None:
        numbers = sorted(versions(root), reverse=True)
        folders = [Path(root).absolute() / f"version_{number}" for number in numbers]
    else:
        folders = [folder_of(given)]
    # Written when training starts; this start may have claimed a folder of its own already.
    config = next((f / "config.yaml" for f in folders if (f / "config.yaml").is_file()), None)
    if config is None or config.stat().st_mtime < _job_began():
        return given
    try:
        return find_last(config.parent)
    except FileNotFoundError:
        return given


def _job_began() -> float:
    """When torchrun first started the processes: it then made a folder for their errors."""
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not error_file:
        return 0.0
    first = Path(error_file).parent.parent.with_name("attempt_0")
    return first.stat().st_mtime if first.is_dir() else 0.0
