r"""The forms that files of records come in. What stands in a file is what a record holds.

* json and jsonl are read by the `json` module: an array of objects, or one object a line. Texts,
  numbers and dates stay what they are, record by record; half of a surrogate pair (``\ud83d``
  alone), which is no text, and a field that stands twice in one object are refused.
* csv is read by the `csv` module: every cell is a text, ``00501``, ``1.50`` and ``None`` too. An
  empty cell is a missing one, as csv cannot tell the two apart. A row has as many cells as the
  header; a column without a name is left out.
* parquet is read by `pyarrow`, in the types that the file says.

Texts are UTF-8, with or without a byte-order mark.
"""

from __future__ import annotations

import codecs
import csv
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from json import JSONDecodeError
from pathlib import Path
from typing import Any

from lightning_peft.datamodules.loading.fields import first_line
from lightning_peft.errors import shown

COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"PK\x03\x04": "zip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
}
_HALF = re.compile(r"\\u[dD][89a-fA-F]")  # of a surrogate pair
_SPACE = re.compile(r"[ \t\r\n]*")
_LONGEST_CELL = 2**31 - 1


class Broken(Exception):
    """A file is not of its form; says where and why."""


class NotText(Broken):
    """A file holds no text at all; says what it is, and what would do."""


# JSON ---------------------------------------------------------------------------------------------


def read_json(path: Path) -> Iterator[Any]:
    """Read an array, or an object from each line; empty lines are passed over.

    Raises:
        Broken: If the file is anything else; names the line.
    """
    _refuse_what_is_no_text(path)
    with path.open("rb") as file:
        first = True
        for number, line in enumerate(file, start=1):
            line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if not line.strip():
                continue
            if first and line.lstrip().startswith(b"["):
                yield from _array(_decoded(line + file.read(), number), number)
                return
            try:
                found = loads(_decoded(line.rstrip(), number), number)
            except Broken:
                found = _whole(line + file.read(), number) if first else None
                if found is None:
                    raise
            first = False
            yield found


def loads(text: str, line: int = 1) -> Any:
    """Read what one text of JSON says, for which `json.loads` takes more than there is.

    Args:
        text: The text.
        line: Where it begins in its file.

    Raises:
        Broken: If it is no JSON, is nested too deeply, repeats a field in an object, or holds what
            is no text.
    """
    start = _space(text, 0)
    found, end = _element(text, start, line)
    if (end := _space(text, end)) != len(text):
        raise Broken(_place(JSONDecodeError("Extra data", text, end), line))
    return found


def _array(text: str, line: int) -> Iterator[Any]:
    """Read an array element by element, so that what is wrong with one names its line."""
    position = _space(text, _space(text, 0) + 1)
    more = text[position : position + 1] != "]"
    while more:
        found, position = _element(text, position, line)
        yield found
        position = _space(text, position)
        more = text[position : position + 1] == ","
        if more:
            position = _space(text, position + 1)
    if text[position : position + 1] != "]":
        raise Broken(_place(JSONDecodeError("Expecting ',' delimiter", text, position), line))
    if (position := _space(text, position + 1)) != len(text):
        raise Broken(_place(JSONDecodeError("Extra data", text, position), line))


def _element(text: str, position: int, line: int) -> tuple[Any, int]:
    """Read one value, and tell where it ends."""
    try:
        found, end = _DECODER.raw_decode(text, position)
        if _HALF.search(text, position, end):
            json.dumps(found, ensure_ascii=False).encode()
        return found, end
    except JSONDecodeError as error:
        raise Broken(_place(error, line)) from error
    except RecursionError as error:
        reason = "it is nested too deeply"
        cause: Exception = error
    except UnicodeEncodeError as error:
        reason, cause = f"half of a surrogate pair, {error.object[error.start]!r}", error
    except ValueError as error:  # a repeated field, or a number of thousands of digits
        reason, cause = str(error).partition(";")[0], error
    raise Broken(f"line {line + text.count(chr(10), 0, position)}: {reason}") from cause


def _whole(content: bytes, line: int) -> dict[str, Any] | None:
    """Read a single object over several lines, if that is what a file holds."""
    try:
        found = loads(_decoded(content, line), line)
    except Broken:
        return None
    return found if isinstance(found, dict) else None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the field {shown(twice)} stands twice in one object")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def _space(text: str, position: int) -> int:
    return _SPACE.match(text, position).end()  # type: ignore[union-attr]


def _place(error: JSONDecodeError, line: int) -> str:
    return f"line {line + error.lineno - 1}: {error.msg}, column {error.colno}"


# CSV ----------------------------------------------------------------------------------------------


def read_csv(path: Path) -> Iterator[dict[str, str | None]]:
    """Read the rows under a header, every cell as a text and an empty one as None.

    Raises:
        Broken: If it is no csv in UTF-8, or a row has other cells than the header; names the line.
    """
    _refuse_what_is_no_text(path)
    with path.open(encoding="utf-8-sig", newline="") as file, _cells_of_any_length():
        rows = csv.reader(file, strict=True)
        try:
            yield from _named(rows)
        except UnicodeDecodeError as error:
            _decoded(path.read_bytes(), 1)  # names the line, which a stream cannot
            raise Broken(str(error)) from error
        except csv.Error as error:
            raise Broken(f"line {rows.line_num}: {error}") from error


def _named(rows: Any) -> Iterator[dict[str, str | None]]:
    header: list[str] = next(rows, [])
    if twice := next((name for name in header if name and header.count(name) > 1), None):
        raise Broken(f"line 1: the header has {shown(twice)} twice")
    for row in rows:
        if not row:
            continue
        if len(row) != len(header):
            count = f"{len(row)} cell{'s' * (len(row) != 1)}"
            raise Broken(f"line {rows.line_num}: {count}, where the header has {len(header)}")
        if any("\0" in cell for cell in row):
            raise Broken(f"line {rows.line_num}: a NUL byte, which is in no text")
        yield {name: cell or None for name, cell in zip(header, row, strict=True) if name}


@contextmanager
def _cells_of_any_length() -> Iterator[None]:
    before = csv.field_size_limit(_LONGEST_CELL)
    try:
        yield
    finally:
        csv.field_size_limit(before)


# Parquet ------------------------------------------------------------------------------------------


def read_parquet(path: Path) -> Iterator[dict[str, Any]]:
    """Read the rows of a parquet file.

    Raises:
        Broken: If it is none.
    """
    import pyarrow.parquet

    if not path.stat().st_size:
        return
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if twice := next((name for name in names if names.count(name) > 1), None):
                raise Broken(f"it has the column {shown(twice)} twice")
            for batch in file.iter_batches():
                yield from batch.to_pylist()
    except (Broken, MemoryError):
        raise
    except Exception as error:  # of many types, the library's and its decoders'
        if isinstance(error, OSError) and error.errno:
            raise  # the disk's
        raise Broken(first_line(error)) from error


# Text ---------------------------------------------------------------------------------------------


def _refuse_what_is_no_text(path: Path) -> None:
    """Tell compressed files, parquet and wider encodings, of which a decoder's error says little.

    Raises:
        NotText: If it is one.
    """
    with path.open("rb") as file:
        begin = file.read(8)
    kind = next((name for mark, name in COMPRESSED.items() if begin.startswith(mark)), None)
    if kind:
        raise NotText(f"is compressed ({kind}), which its name does not say; unpack it first.")
    if begin.startswith(b"PAR1"):
        raise NotText("is parquet by what is in it; name it so.")
    wide = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)
    if begin.startswith(wide) or b"\0" in begin[:4]:
        raise NotText("is not UTF-8 but, it seems, UTF-16; save it as UTF-8.")


def _decoded(content: bytes, line: int) -> str:
    """Decode what begins in a line."""
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        number = line + content.count(b"\n", 0, error.start)
        byte = content[error.start]
        raise Broken(f"line {number}: the byte 0x{byte:02x} is not UTF-8") from error
