"""``metrics.csv``: a logger that goes on with the file of the run that it resumes."""

from __future__ import annotations

import csv
import errno
import io
import os
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_only

from lightning_peft.atomic import append_text, write_text


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
        if self.rows and not self.path.is_file():  # written anew, it would hide what else is gone
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self.path))
        new = [key for key in row if key not in self.columns]
        self.columns += new
        if self.rows and self.rows[-1]["step"] == step_text:
            self.rows[-1].update(row)
            self._rewrite()
            return
        self.rows.append({"step": step_text, **row})
        if new or len(self.rows) == 1:
            self._rewrite()
        else:
            append_text(self.path, self._text([self.rows[-1]]))

    @rank_zero_only
    def save(self) -> None:
        """Nothing: rows are on the disk already."""

    def _rewrite(self) -> None:
        header = dict(zip(self.columns, self.columns, strict=True))
        write_text(self.path, self._text([header, *self.rows]))

    def _text(self, rows: list[dict[str, str]]) -> str:
        file = io.StringIO(newline="")
        csv.DictWriter(file, self.columns, restval="").writerows(rows)
        return file.getvalue()
