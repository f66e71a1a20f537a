"""What stands in a file is what a record holds, in every form; else the line is named."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lightning_peft.datamodules.loading.formats import (
    Broken,
    NotText,
    loads,
    read_csv,
    read_json,
    read_parquet,
)

PACKED = gzip.compress(b'{"q": 1}', mtime=0)


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write_content(content: str | bytes) -> Path:
        path = tmp_path / "file"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write_content


# CSV ----------------------------------------------------------------------------------------------

CELLS = ["00501", "1.50", "true", "12345678901234567890", "None", "NA", "nan", "2020-01-01", " a "]


def test_every_cell_is_a_text_and_an_empty_one_is_missing(write: Any) -> None:
    rows = [{"a": cell, "b": "1"} for cell in CELLS]
    text = "a,b\n" + "".join(f"{cell},1\n" for cell in CELLS)
    assert list(read_csv(write(text))) == rows
    assert list(read_csv(write("a,b\n,5\n1,\n"))) == [{"a": None, "b": "5"}, {"a": "1", "b": None}]


def test_quotes_line_breaks_and_marks_are_read_as_they_are_written(write: Any) -> None:
    text = '\ufeffa,b\r\n"x ""y"", z","1\r\n2"\r\n5" pipe,\u2028é\r\n'
    wanted = [{"a": 'x "y", z', "b": "1\r\n2"}, {"a": '5" pipe', "b": "\u2028é"}]
    assert list(read_csv(write(text))) == wanted
    assert list(read_csv(write("a\r1\r\r2"))) == [{"a": "1"}, {"a": "2"}]


def test_a_column_without_a_name_is_left_out(write: Any) -> None:
    assert list(read_csv(write(",a,\n0,x,y\n"))) == [{"a": "x"}]


def test_a_cell_of_any_length_is_read_and_the_limit_of_others_stays(write: Any) -> None:
    limit = csv.field_size_limit()
    assert list(read_csv(write(f"a\n{'x' * 300_000}\n"))) == [{"a": "x" * 300_000}]
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("a,b\n1,2\n1\n", "line 3: 1 cell, where the header has 2"),
        ("a,b\n1,2\n1,2,3\n", "line 3: 3 cells, where the header has 2"),
        ("a,b\n1,2\n\n\n,,,\n", "line 5: 4 cells, where the header has 2"),
        ("a,b,a\n1,2,3\n", "line 1: the header has 'a' twice"),
        ('a,b\n1,2\n"1,2\n1,2\n', "line 4: unexpected end of data"),
        ('a,b\n1,"x"y\n', "line 2: ',' expected after '\"'"),
        (b"a,b\n1,2\n\n1,\xe4\n", "line 4: the byte 0xe4 is not UTF-8"),
        (b"a,b\n1,2\n1,\xc3", "line 3: the byte 0xc3 is not UTF-8"),
    ],
)
def test_a_broken_row_is_named_by_its_line(content: Any, sentence: str, write: Any) -> None:
    with pytest.raises(Broken) as error:
        list(read_csv(write(content)))
    assert str(error.value) == sentence


def test_a_nul_byte_is_in_no_text(write: Any) -> None:
    with pytest.raises(Broken, match=r"^line 2: .*NUL"):
        list(read_csv(write("a,b\n1,x\0y\n")))


# JSON ---------------------------------------------------------------------------------------------

RECORDS = [
    {"q": "2020-01-01", "n": 1},
    {"q": "00501", "n": 2.5},
    {"q": True, "n": None},
    {"q": [1, "a"], "n": {"x": 12345678901234567890123}},
    {"q": "\U0001f600 \u2028é", "other": ""},
    {},
]


@pytest.mark.parametrize("ascii_only", [True, False])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_values_stay_what_json_says_record_by_record(
    ascii_only: bool, mark: str, write: Any
) -> None:
    lines = "\n\n".join(json.dumps(r, ensure_ascii=ascii_only) for r in RECORDS)
    array = json.dumps(RECORDS, ensure_ascii=ascii_only, indent=1)
    for text in (lines, array, f"\n {array}\n"):
        found = list(read_json(write(mark + text)))
        assert repr(found) == repr(RECORDS)


def test_a_single_object_may_stand_on_several_lines(write: Any) -> None:
    assert list(read_json(write('{\n "q": 1\n}\n'))) == [{"q": 1}]
    assert list(read_json(write("[]"))) == list(read_json(write(" \n"))) == []


def test_what_is_no_number_stays_what_python_takes_it_for() -> None:
    assert repr(loads('{"a": NaN, "b": [-Infinity]}')) == "{'a': nan, 'b': [-inf]}"


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ('{"q": 1}\n{"q": 1, "q": 2}', "line 2: the field 'q' stands twice in one object"),
        ('[{"q": 1},\n{"a": {"q": 1, "q": 2}}]', "line 2: the field 'q' stands twice in one obj"),
        ('[{"q": 1},\n\n{"q": "\\ud83d"}]', "line 3: half of a surrogate pair, '\\ud83d'"),
        ('{"q": "\\uDE00\\uD83D"}', "line 1: half of a surrogate pair, '\\ude00'"),
        (f'{{"q": 1}}\n{{"q": {"[" * 99999}}}', "line 2: it is nested too deeply"),
        (f'{{"q": 1}}\n{{"q": {"9" * 5000}}}', "line 2: Exceeds the limit"),
        ('{"q": 1}\n[{"q": 1}', "line 2: Expecting ',' delimiter, column 10"),
        ('[{"q": 1},]', "line 1: Expecting value, column 11"),
        ('[{"q": 1}\n] 5', "line 2: Extra data, column 3"),
        ('{"q": 1} {"q": 2}', "line 1: Extra data, column 10"),
        ('{"q": "a\tb"}', "line 1: Invalid control character at, column 9"),
        (b'{"q": 1}\n{"q": "\xff"}', "line 2: the byte 0xff is not UTF-8"),
        (b'[{"q": 1},\n{"q": "\xff"}]', "line 2: the byte 0xff is not UTF-8"),
    ],
)
def test_what_is_wrong_is_named_by_its_line(content: Any, sentence: str, write: Any) -> None:
    with pytest.raises(Broken) as error:
        list(read_json(write(content)))
    assert str(error.value).startswith(sentence)


# What is no text ----------------------------------------------------------------------------------


@pytest.mark.parametrize("reader", [read_csv, read_json])
@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (PACKED, "is compressed (gzip), which its name does not say; unpack"),
        (PACKED[:12], "is compressed (gzip), which its name does not say; "),
        (b"PK\x03\x04rest", "is compressed (zip)"),
        (b"PAR1rest", "is parquet by what is in it; name it so."),
        ('{"q": 1}'.encode("utf-16"), "is not UTF-8 but, it seems, UTF-16; save it as UTF-8."),
        ('{"q": 1}'.encode("utf-16-be"), "is not UTF-8 but, it seems, UTF-16"),
        ('{"q": 1}'.encode("utf-32"), "is not UTF-8"),
    ],
)
def test_what_is_no_text_is_told(reader: Any, content: bytes, sentence: str, write: Any) -> None:
    with pytest.raises(NotText) as error:
        list(reader(write(content)))
    assert str(error.value).startswith(sentence)


# Parquet ------------------------------------------------------------------------------------------


def test_parquet_holds_the_types_that_it_says(tmp_path: Path) -> None:
    rows = [{"q": "00501", "n": 1, "l": ["a"]}, {"q": None, "n": None, "l": []}]
    folder = tmp_path / "split=1"  # which a data set's reader would make a column of
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist(rows), folder / "a.parquet")
    found = list(read_parquet(folder / "a.parquet"))
    assert found == rows
    assert type(found[0]["n"]) is int


def test_broken_parquet_is_told(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pa.table([pa.array([1]), pa.array([2])], names=["q", "q"])
    pq.write_table(table, path)
    with pytest.raises(Broken, match="^it has the column 'q' twice$"):
        list(read_parquet(path))
    pq.write_table(pa.table({"q": ["a" * 50] * 50}), path)
    whole = path.read_bytes()
    for end in (1, 3, 20, len(whole) - 9, len(whole) - 1):
        path.write_bytes(whole[:end])
        with pytest.raises(Broken):
            list(read_parquet(path))
