"""A run's folder: where it is, its logger, and checkpoints that are written whole.

<root>/version_N/
    config.yaml  metrics.csv  importance.csv  importance.png  run.json
    adapter/  checkpoints/  predictions/
"""

from __future__ import annotations

import csv
import os
import re
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

from lightning_peft.atomic import is_held, write_atomically
from lightning_peft.errors import MissingFile, UserError


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoints that a crash in the middle of writing cannot harm.

    Lightning's own writer goes through a temporary file that may lie on another file system, from
    where a move is a copy.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        """Write a checkpoint beside its place and move it there."""
        write_atomically(path, lambda part: torch.save(checkpoint, part))

    def load_checkpoint(
        self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint.

        Raises:
            MissingFile: If there is none.
            UserError: If it is cut off or damaged.
        """
        return read_checkpoint(path, map_location)


def read_checkpoint(path: str | Path, map_location: Any = "cpu") -> dict[str, Any]:
    """Read a checkpoint, or say in one sentence why that fails.

    Args:
        path: The file.
        map_location: As in ``torch.load``.

    Returns:
        The checkpoint.

    Raises:
        MissingFile: If there is none.
        UserError: If it is cut off or damaged.
    """
    if Path(path).is_dir():
        raise UserError(
            f"{path} is a folder of shards that another program wrote; checkpoints here are single "
            "files, under every engine."
        )
    if not Path(path).is_file():
        raise MissingFile(f"the checkpoint {path} does not exist.")
    try:
        return torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:  # torch raises many types for a damaged file
        reason = str(error).strip().split("\n")[0].split(". ")[0] or type(error).__name__
        raise UserError(
            f"the checkpoint {path} is cut off or damaged ({reason}); resume from the one "
            "before it."
        ) from error


def next_folder(root: str | Path) -> Path:
    """The folder of a new run under a root: ``version_N`` with the first N above those there."""
    return Path(root).absolute() / f"version_{max(_versions(root), default=-1) + 1}"


def interrupted_test(root: str | Path) -> Path | None:
    """The newest folder under a root, if it holds a test that was cut off, and nothing else.

    A test of a checkpoint uses the folder of the checkpoint's run and is found there anyway.
    """
    folder = _newest_folder(root)
    parts = [p for p in folder.glob("predictions/*.part*") if not p.name.startswith(".")]
    own = not (folder / "config.yaml").exists() and not (folder / "checkpoints").exists()
    return folder if parts and own and not any(map(is_held, parts)) else None


def _newest_folder(root: str | Path) -> Path:
    """The newest run's folder, which is not there if there is no run."""
    return Path(root).absolute() / f"version_{max(_versions(root), default=-1)}"


def _versions(root: str | Path) -> list[int]:
    names = (
        re.fullmatch(r"version_(\d+)", p.name) for p in Path(root).glob("version_*") if p.is_dir()
    )
    return [int(name[1]) for name in names if name]


def folder_of(checkpoint: str | Path) -> Path:
    """The folder of the run that wrote a checkpoint."""
    parent = Path(checkpoint).absolute().parent
    return parent.parent if parent.name == "checkpoints" else parent


def belongs_to_run(checkpoint: str | Path) -> bool:
    """Whether a checkpoint lies in the folder of a run of ours, where its results belong."""
    return (folder_of(checkpoint) / "config.yaml").is_file()


def find_last(root: str | Path) -> Path:
    """The newest checkpoint that can be read, of the newest run under a root that has any.

    Args:
        root: The trainer's ``default_root_dir``, or a run's own folder.

    Returns:
        The checkpoint's path.

    Raises:
        MissingFile: If there is none.
    """
    root = Path(root)
    folders = [root, *(root / f"version_{n}" for n in sorted(_versions(root), reverse=True))]
    for folder in folders:
        files = sorted(
            folder.glob("checkpoints/*.ckpt"),
            key=lambda p: (step_of(p), p.stat().st_mtime),
            reverse=True,
        )
        for path in files:
            try:
                read_checkpoint(path)
            except ValueError as error:
                rank_zero_warn(str(error))
                continue
            return path
    raise MissingFile(f"ckpt_path: last was given, but no run under {root} has a checkpoint.")


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
    folder = _newest_folder(root) if given is None else folder_of(given)
    config = folder / "config.yaml"  # written when training starts
    if not config.is_file() or config.stat().st_mtime < _job_began():
        return given
    try:
        return find_last(folder)
    except FileNotFoundError:
        return given


def _job_began() -> float:
    """When torchrun first started the processes: it then made a folder for their errors."""
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not error_file:
        return 0.0
    first = Path(error_file).parent.parent.with_name("attempt_0")
    return first.stat().st_mtime if first.is_dir() else 0.0


def step_of(path: Path) -> int:
    """The optimizer steps behind a checkpoint, by its name; -1 where that does not tell."""
    step = re.search(r"step=(\d+)", path.name)
    return int(step[1]) if step else -1


class RunLogger(CSVLogger):
    """``metrics.csv`` in a run's folder, each step once, also after a resumption.

    Rows go to the disk as they come. Lightning's own CSV logger deletes the file of the run that it
    should go on with.

    Args:
        folder: The run's folder.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__(save_dir=folder, name="", version="")
        self.path = Path(folder) / "metrics.csv"
        self.rows: list[dict[str, str]] = []
        self.columns = ["step"]
        self._read()

    @property
    def experiment(self) -> None:
        """None: asked for it at every start, Lightning's own would delete ``metrics.csv``."""

    @property
    def log_dir(self) -> str:
        """The run's folder itself."""
        return str(self.path.parent)

    def _read(self) -> None:
        """Take up the rows of an earlier session, but for a last line that was cut off."""
        if not self.path.is_file():
            return
        with self.path.open(newline="") as file:
            reader = csv.DictReader(file)
            self.columns = list(reader.fieldnames or ["step"])
            self.rows = [
                row for row in reader if None not in row.values() and row["step"].isdigit()
            ]

    def go_on_from(self, step: int) -> None:
        """Keep the rows of steps below ``step`` (0-based); the resumed run writes the others."""
        self.rows = [row for row in self.rows if int(row["step"]) < step]
        self._rewrite()

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: ``config.yaml`` holds them."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Write one row; metrics of one step that come one after another share a row."""
        # A test's scores belong to no step; run.json has them.
        kept = {key: value for key, value in metrics.items() if not key.startswith("test/")}
        if not kept.keys() - {"epoch"}:
            return
        row = {key: f"{float(value):.9g}" for key, value in kept.items()}
        step_text = str(0 if step is None else step)
        new = [key for key in row if key not in self.columns]
        self.columns += new
        if self.rows and self.rows[-1]["step"] == step_text:
            self.rows[-1].update(row)
            self._rewrite()
            return
        self.rows.append({"step": step_text, **row})
        if new or not self.path.is_file():
            self._rewrite()
        else:
            with self.path.open("a", newline="") as file:
                csv.DictWriter(file, self.columns, restval="").writerow(self.rows[-1])

    @rank_zero_only
    def save(self) -> None:
        """Nothing: rows are on the disk already."""

    def _rewrite(self) -> None:
        def write(path: Path) -> None:
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, self.columns, restval="")
                writer.writeheader()
                writer.writerows(self.rows)

        write_atomically(self.path, write)
