"""The tables that runs leave behind; a run that was killed may have cut off its last line."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_peft.errors import MissingFile, UserError

Row = dict[str, Any]
Metrics = dict[str, float]

IMPORTANCE: Mapping[str, Callable[[str], Any]] = {
    "step": int,
    "layer": str,
    "kind": str,
    "rank": int,
    "importance": float,
    "share": float,
    "measure": str,
}
# What the column "importance" holds, by the column "measure".
MEASURES = {
    "output": "mean ‖ΔWx‖² per token",
    "weight": "‖ΔW‖_F",  # of methods without adapters, whose ΔW is no product of two factors
}
DECISIONS: Mapping[str, Callable[[str], Any]] = {
    "step": int,
    "layer": str,
    "event": str,
    "rank": int,
}


def source(folder: Path, name: str, made: str) -> Path:
    """A file of a run's folder that must be there.

    Args:
        folder: The run's folder.
        name: The file's name.
        made: What writes it and when, for the error.

    Returns:
        Its path.

    Raises:
        MissingFile: If it is not there.
    """
    path = folder / name
    if not path.is_file():
        raise MissingFile(f"{path} does not exist; {made}.")
    return path


def _records(path: Path) -> list[Row]:
    """Lines as they stand; a last line without its line feed was cut off and is left out."""
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    return list(csv.DictReader(whole.splitlines()))


def read_table(path: Path, columns: Mapping[str, Callable[[str], Any]]) -> list[Row]:
    """Read a csv file of known columns.

    Args:
        path: The file.
        columns: Name and type of each column.

    Returns:
        A dict for each whole line.

    Raises:
        UserError: If a column is missing, or a value is not of its type; names the file.
    """
    rows = []
    for number, record in enumerate(_records(path), start=2):
        try:
            rows.append({name: convert(record[name]) for name, convert in columns.items()})
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{path}, line {number}: expected {', '.join(columns)}, "
                f"got {list(record.values())}."
            ) from error
    return rows


def read_if_there(path: Path, columns: Mapping[str, Callable[[str], Any]]) -> list[Row]:
    """Read a csv file of known columns as :func:`read_table` does; no rows where there is none."""
    return read_table(path, columns) if path.is_file() else []


def csv_text(rows: Sequence[Row], columns: Iterable[str]) -> str:
    """Rows as lines of a csv file, without the line of names; floats with nine digits.

    Args:
        rows: The rows.
        columns: Names in order.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for row in rows:
        values = (row[name] for name in columns)
        writer.writerow([f"{v:.9g}" if isinstance(v, float) else v for v in values])
    return text.getvalue()


def read_metrics(path: Path) -> list[Metrics]:
    """Read the ``metrics.csv`` of Lightning's CSVLogger.

    Args:
        path: The file.

    Returns:
        For each whole line the numbers that stand in it, ``step`` among them.

    Raises:
        UserError: If something else than a number stands in a line; names the file.
    """
    try:
        return [
            {name: float(value) for name, value in record.items() if name and value}
            for record in _records(path)
        ]
    except (TypeError, ValueError) as error:
        raise UserError(f"{path} is not a table of numbers: {error}.") from error


def series(rows: Sequence[Metrics], name: str) -> list[tuple[float, float]]:
    """Steps and values of one metric, in ascending order.

    Args:
        rows: Of ``metrics.csv``; a row holds some metrics and their ``step``.
        name: The metric.

    Returns:
        (step, value) of each row that holds both.
    """
    return sorted((row["step"], row[name]) for row in rows if name in row and "step" in row)
