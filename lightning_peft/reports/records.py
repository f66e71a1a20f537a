"""Reading what runs leave behind; a run that was killed may have cut off its last line."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning_peft.errors import UserError

Row = dict[str, Any]

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


def read_metrics(path: Path) -> list[dict[str, float]]:
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
