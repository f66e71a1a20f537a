"""Reading one file of records: json (an array), jsonl, csv or parquet, by its name.

Errors name the file and the record, or the line that is broken. What the forms are, `formats` says.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lightning_peft.datamodules.loading.fields import described, filled, text_in
from lightning_peft.datamodules.loading.formats import (
    Broken,
    NotText,
    read_csv,
    read_json,
    read_parquet,
)
from lightning_peft.errors import UserError

Records = list[dict[str, Any]]
READERS = {".json": read_json, ".jsonl": read_json, ".csv": read_csv, ".parquet": read_parquet}
KINDS = {".csv": "csv", ".parquet": "parquet"}  # the others are JSON


def read_file(path: str | Path, required: Sequence[str] = (), texts: Sequence[str] = ()) -> Records:
    """Read a file of records.

    Args:
        path: A json, jsonl, csv or parquet file.
        required: Fields that every record has to hold something in.
        texts: Fields that every record has to hold a text in.

    Returns:
        The records, in their order. What one lacks and others have is None in it.

    Raises:
        UserError: If the file cannot be read, holds no record, or one without a required field.
    """
    ending = Path(path).suffix.lower()
    reader = READERS.get(ending)
    if reader is None:
        raise UserError(f"{path} is none of {', '.join(READERS)}.")
    if not is_file(path):
        raise UserError(f"{path} {'is a folder' if is_folder(path) else 'does not exist'}.")
    try:
        records = _alike(reader(Path(path)), path)
    except NotText as error:
        raise UserError(f"{path} {error}") from error
    except Broken as error:
        raise UserError(f"{path} is not {KINDS.get(ending, 'JSON')} ({error}).") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({reason(error)}).") from error
    return checked(records, path, required, texts)


def checked(
    records: Records, place: str | Path, required: Sequence[str], texts: Sequence[str] = ()
) -> Records:
    """Return records, or refuse them where one lacks a required field, or a text in one."""
    for number, record in enumerate(records, start=1):
        for field in (*texts, *required):
            if record.get(field) is None:
                found = filled(record) or "empty fields"
                raise UserError(f"Record {number} of {place} has no {field!r}, only {found}.")
        for field in texts:
            text_in(record, field, f"Record {number} of {place}")
    return records


def is_file(path: str | Path) -> bool:
    """Say whether there is a file; raises where that cannot be looked up."""
    return stat.S_ISREG(_mode(path))


def is_folder(path: str | Path) -> bool:
    """Say whether there is a folder; raises where that cannot be looked up."""
    return stat.S_ISDIR(_mode(path))


def listing(folder: str | Path) -> list[Path]:
    """List what lies in a folder, by name; raises where that cannot be seen."""
    try:
        return sorted(Path(folder).iterdir())
    except OSError as error:
        raise UserError(f"{folder} cannot be read ({reason(error)}).") from error


def reason(error: OSError) -> str:
    """Say why the system refuses something, without the path and the number."""
    return error.strerror or str(error) or type(error).__name__


def _mode(path: str | Path) -> int:
    try:
        return os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return 0
    except OSError as error:
        raise UserError(f"{path} cannot be read ({reason(error)}).") from error
    except ValueError as error:  # a NUL byte, or half of a surrogate pair
        raise UserError(f"{str(path)!r} is no path ({error}).") from error


def _alike(found: Iterable[Any], path: str | Path) -> Records:
    """Give all records the fields of each."""
    records = []
    for number, record in enumerate(found, start=1):
        if not isinstance(record, dict):
            raise UserError(
                f"Record {number} of {path} has no text under a name but is {described(record)}; "
                'wanted are objects such as {"text": "…"}.'
            )
        records.append(record)
    fields = list(dict.fromkeys(field for record in records for field in record))
    if not fields:
        raise UserError(f"{path} holds no record.")
    if all(len(record) == len(fields) for record in records):
        return records
    return [{field: record.get(field) for field in fields} for record in records]
