"""Files of records, and the one sentence for whatever is wrong with one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lightning_peft.datamodules.loading.files import listing
from lightning_peft.datamodules.loading.records import Source

# Files --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["a.json", "a.jsonl", "a.csv", "a.parquet", "a.JSON", "a[1]*.jsonl", "sub/a?.csv"]
)
def test_a_file_is_read_by_its_name(
    name: str, read: Any, tmp_path: Path, texts: Any, write_rows: Any
) -> None:
    found = [{**row, "n": str(row["n"])} for row in texts] if ".csv" in name else texts
    assert read(write_rows(tmp_path / name, texts), ["q", "n"], ["q"]) == found


def test_a_changed_file_is_read_anew(
    read: Any, tmp_path: Path, texts: Any, write_rows: Any
) -> None:
    assert read(write_rows(tmp_path / "a.json", texts)) == texts
    assert read(write_rows(tmp_path / "a.json", texts[:1])) == texts[:1]


def test_fields_that_a_record_lacks_are_none(read: Any, tmp_path: Path, write_rows: Any) -> None:
    rows = read(write_rows(tmp_path / "a.json", [{"q": "one"}, {"q": "two", "n": 2}]), ["q"])
    assert rows == [{"q": "one", "n": None}, {"q": "two", "n": 2}]


def test_nested_fields_and_empty_lines_are_read(read: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"turns": [{"role": "user"}]}\n\n{"turns": []}\n')
    assert read(path) == [{"turns": [{"role": "user"}]}, {"turns": []}]


@pytest.mark.parametrize("ending", ["json", "jsonl", "csv", "parquet"])
def test_a_required_field_that_is_missing_is_named(
    ending: str, read: Any, tmp_path: Path, texts: Any, write_rows: Any, refused: Any
) -> None:
    path = write_rows(tmp_path / f"a.{ending}", [*texts, {"q": None, "n": 4}])
    with refused(f"Record 4 of {path} has no 'q', only n."):
        read(path, ["n", "q"])
    with refused(f"Record 1 of {path} has no 'answer', only q, n."):
        read(path, ["q", "answer"])


def test_a_record_without_any_field_is_named(
    read: Any, tmp_path: Path, write_rows: Any, refused: Any
) -> None:
    path = write_rows(tmp_path / "a.json", [{"q": "one"}, {}])
    with refused(f"Record 2 of {path} has no 'q', only empty fields."):
        read(path, ["q"])


@pytest.mark.parametrize("name", ["a.txt", "a", "a.json.gz"])
def test_an_unknown_ending_is_refused(name: str, read: Any, tmp_path: Path, refused: Any) -> None:
    (tmp_path / name).write_text("[]")
    with refused(f"{tmp_path / name} is none of .json, .jsonl, .csv, .parquet."):
        read(tmp_path / name)


@pytest.mark.parametrize("name", ["a.json", "a.parquet"])
def test_a_missing_file_is_named(name: str, read: Any, tmp_path: Path, refused: Any) -> None:
    with refused(f"{tmp_path / name} does not exist."):
        read(tmp_path / name)
    (tmp_path / name).mkdir()
    with refused(f"{tmp_path / name} is a folder."):
        read(tmp_path / name)


def test_a_folder_that_cannot_be_listed_is_said(
    tmp_path: Path, refused: Any, monkeypatch: Any
) -> None:
    (tmp_path / "b").touch()
    (tmp_path / "a").touch()
    assert listing(tmp_path) == [tmp_path / "a", tmp_path / "b"]

    def refuse(*args: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refuse)
    sentence = f"{tmp_path} cannot be read (Permission denied)."
    with refused(sentence):
        listing(tmp_path)
    with refused(sentence):
        Source(("*.json",), "o/n", "train").read(str(tmp_path))


def test_what_the_system_refuses_is_said(
    read: Any, tmp_path: Path, write_rows: Any, texts: Any, refused: Any, monkeypatch: Any
) -> None:
    long = tmp_path / f"{'x' * 300}.json"
    with refused(f"{long} cannot be read (File name too long)."):
        read(long)
    with refused("'a\\x00.json' is no path (embedded null byte)."):
        read("a\0.json")
    path = write_rows(tmp_path / "a.jsonl", texts)

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refuse)
    with refused(f"{path} cannot be read (Permission denied)."):
        read(path)


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ("5", 'the number 5; write it as a text, "5"'),
        ("1.50", 'the number 1.5; write it as a text, "1.5"'),
        ("true", 'true; write it as a text, "true"'),
        ("NaN", 'the number NaN; write it as a text, "NaN"'),
        ('["a"]', "a list; give one text"),
        ('{"a": 1}', "an object; give one text"),
    ],
)
def test_what_is_no_text_where_one_belongs_is_named(
    value: str, found: str, read: Any, tmp_path: Path, refused: Any
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"q": "a"}}\n{{"q": {value}}}\n')
    with refused(f"Record 2 of {path} has no text in 'q' but {found}."):
        read(path, (), ["q"])


@pytest.mark.parametrize(
    ("text", "found"), [("[1]", "the number 1"), ('["a"]', "the text 'a'"), ("null", "null")]
)
def test_a_record_that_is_no_object_is_named(
    text: str, found: str, read: Any, tmp_path: Path, refused: Any
) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    wanted = 'wanted are objects such as {"text": "…"}.'
    with refused(f"Record 1 of {path} has no text under a name but is {found}; {wanted}"):
        read(path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.JSONL"])
@pytest.mark.parametrize(
    ("text", "line"),
    [
        (b'{"q": 1}\n{"q": 2\n{"q": 3}\n', 2),
        (b'{"q": 1}\n\n{"q": 2', 3),
        (b'{"q": 1}\n{"q": "\xe4"}\n', 2),
        (b"q,n\n1,2\n", 1),
    ],
)
def test_a_broken_line_is_named(
    text: bytes, line: int, name: str, read: Any, tmp_path: Path, refused: Any
) -> None:
    (tmp_path / name).write_bytes(text)
    with refused(f"{tmp_path / name} is not JSON (line {line}: …)."):
        read(tmp_path / name)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (b'[{"q": 1},\n {"q": 2\n]', 3),
        (b'\n\n[{"q": 1},\n {"q" 2}]', 4),
        (b'{"q": 1}\n{"q"', 2),  # lines under a json file's name
    ],
)
def test_a_broken_line_of_an_array_is_named(
    text: bytes, line: int, read: Any, tmp_path: Path, refused: Any
) -> None:
    (tmp_path / "a.json").write_bytes(text)
    with refused(f"{tmp_path / 'a.json'} is not JSON (line {line}: …)."):
        read(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("name", "text", "kind"),
    [
        ("a.json", b'[{"q": 1}, {"q"', "JSON"),
        ("a.csv", b"q,n\n1,2\n1,2,3\n", "csv"),
        ("a.csv", b"q\n\xe4\n", "csv"),
        ("a.CSV", b"q\n\xe4\n", "csv"),
        ("a.parquet", b"PAR1 but no more", "parquet"),
    ],
)
def test_a_broken_file_is_named(
    name: str, text: bytes, kind: str, read: Any, tmp_path: Path, refused: Any
) -> None:
    (tmp_path / name).write_bytes(text)
    with refused(f"{tmp_path / name} is not {kind} (…)."):
        read(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.json", ""),
        ("a.json", "[]"),
        ("a.jsonl", ""),
        ("a.jsonl", "\n\n"),
        ("a.csv", "q,n\n"),
        ("a.csv", ""),
        ("a.parquet", ""),
    ],
)
def test_a_file_without_records_is_refused(
    name: str, text: str, read: Any, tmp_path: Path, refused: Any
) -> None:
    (tmp_path / name).write_text(text)
    with refused(f"{tmp_path / name} holds no record."):
        read(tmp_path / name)
