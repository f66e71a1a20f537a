"""Reading one file of records by `datasets`: json (an array), jsonl, csv or parquet, by its name.

Errors name the file and the record, or the line that is broken.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning_peft.errors import UserError

Records = list[dict[str, Any]]
READERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


def read_file(
    path: str | Path, required: Sequence[str] = (), cache_dir: str | None = None
) -> Records:
    """Read a file of records.

    Args:
        path: A json, jsonl, csv or parquet file.
        required: Fields that every record has to hold something in.
        cache_dir: Where `datasets` keeps what it read; None takes its own place.

    Returns:
        The records, in their order.

    Raises:
        UserError: If the file cannot be read, holds no record, or one without a required field.
    """
    reader = READERS.get(Path(path).suffix.lower())
    if reader is None:
        raise UserError(f"{path} is none of {', '.join(READERS)}.")
    if not Path(path).is_file():
        raise UserError(f"{path} does not exist.")
    return checked(
        one_sentence(lambda: rows_of(reader, str(path), cache_dir), str(path)), path, required
    )


def checked(records: Records, place: str | Path, required: Sequence[str]) -> Records:
    """Return records, or refuse them where one lacks a required field."""
    for number, record in enumerate(records, start=1):
        for field in required:
            if record.get(field) is None:
                found = ", ".join(k for k, v in record.items() if v is not None)
                raise UserError(
                    f"Record {number} of {place} has no {field!r}, only {found or 'empty fields'}."
                )
    return records


def one_sentence(load: Callable[[], Records], place: str) -> Records:
    """Read a file, with an answer in one sentence where that fails."""
    from datasets.exceptions import DatasetGenerationError

    try:
        return load()
    except (DatasetGenerationError, ValueError, StopIteration) as error:
        empty = Path(place).is_file() and not Path(place).stat().st_size
        if empty or isinstance(error, StopIteration) or "corresponds to no data" in str(error):
            raise UserError(f"{place} holds no record.") from error
        kind = {".csv": "csv", ".parquet": "parquet"}.get(Path(place).suffix.lower(), "JSON")
        raise UserError(f"{place} is not {kind} ({_cause(error, place)}).") from error


def _cause(error: Exception, place: str) -> str:
    """Name the line that is broken."""
    kind = Path(place).suffix.lower()
    if kind in (".jsonl", ".json") and Path(place).is_file():
        content = Path(place).read_bytes()  # a line may be broken in its encoding
        whole = kind == ".json" and content.lstrip()[:1] == b"["
        for number, text in enumerate([content] if whole else content.split(b"\n"), start=1):
            try:
                json.loads(text.strip() or b"null")
            except json.JSONDecodeError as broken:
                line = broken.lineno + content[: content.find(text.strip())].count(b"\n")
                return f"line {line if whole else number}: {broken.msg}, column {broken.colno}"
            except ValueError as broken:
                return str(broken) if whole else f"line {number}: {broken}"
    return str(error.__cause__ or error).strip()


def rows_of(reader: str, path: str, cache_dir: str | None) -> Records:
    """Read a file by one of `READERS`, of whatever it holds; errors are the library's."""
    import datasets

    with quiet_datasets():
        # `data_files` as a list: a path may hold characters of a glob pattern.
        data = datasets.load_dataset(
            reader, data_files=[_literal(path)], split="train", cache_dir=cache_dir
        )
    return data.to_list()


def _literal(path: str) -> str:
    return re.sub(r"([\[\]*?])", r"[\1]", path)


@contextmanager
def quiet_datasets() -> Iterator[None]:
    """Silence `datasets`: a progress bar for each small file, and errors that are raised too."""
    import datasets

    silenced = datasets.are_progress_bars_disabled()
    verbosity = datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        if not silenced:
            datasets.enable_progress_bars()
