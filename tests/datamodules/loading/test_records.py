"""Records from files and the hub, and the one sentence for whatever is wrong with them."""

from __future__ import annotations

import csv
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import datasets
import pytest

from lightning_peft.datamodules.loading.records import Source, read_file

ROWS = [{"q": "one", "n": 1}, {"q": "two,\n\u2028zwei", "n": 2}, {"q": 'th"ree', "n": 3}]
Read = Callable[..., list[dict[str, Any]]]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write rows in the form that the file's name tells."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix.lower() == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif path.suffix.lower() == ".jsonl":
        lines = (json.dumps(row, ensure_ascii=False) for row in rows)
        path.write_text("\n".join(lines), encoding="utf-8")
    elif path.suffix.lower() == ".csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        datasets.Dataset.from_list(rows).to_parquet(str(path))
    return path


@pytest.fixture
def read(tmp_path: Path) -> Read:
    def read_with_cache(path: Path, required: Any = ()) -> list[dict[str, Any]]:
        return read_file(path, required, str(tmp_path / "cache"))

    return read_with_cache


def refused(sentence: str) -> Any:
    """The whole message is this, in one line; ``…`` stands for a library's own words."""
    pattern = ".+".join(map(re.escape, sentence.split("…")))
    return pytest.raises(ValueError, match=rf"\A{pattern}\Z")


# Files --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["a.json", "a.jsonl", "a.csv", "a.parquet", "a.JSON", "a[1]*.jsonl", "sub/a?.csv"]
)
def test_a_file_is_read_by_its_name(name: str, read: Read, tmp_path: Path) -> None:
    assert read(write(tmp_path / name, ROWS), ["q", "n"]) == ROWS


def test_a_changed_file_is_read_anew(read: Read, tmp_path: Path) -> None:
    assert read(write(tmp_path / "a.json", ROWS)) == ROWS
    assert read(write(tmp_path / "a.json", ROWS[:1])) == ROWS[:1]


def test_fields_that_a_record_lacks_are_none(read: Read, tmp_path: Path) -> None:
    rows = read(write(tmp_path / "a.json", [{"q": "one"}, {"q": "two", "n": 2}]), ["q"])
    assert rows == [{"q": "one", "n": None}, {"q": "two", "n": 2}]


def test_nested_fields_and_empty_lines_are_read(read: Read, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"turns": [{"role": "user"}]}\n\n{"turns": []}\n')
    assert read(path) == [{"turns": [{"role": "user"}]}, {"turns": []}]


@pytest.mark.parametrize("ending", ["json", "jsonl", "csv", "parquet"])
def test_a_required_field_that_is_missing_is_named(ending: str, read: Read, tmp_path: Path) -> None:
    path = write(tmp_path / f"a.{ending}", [*ROWS, {"q": None, "n": 4}])
    with refused(f"Record 4 of {path} has no 'q', only n."):
        read(path, ["n", "q"])
    with refused(f"Record 1 of {path} has no 'answer', only q, n."):
        read(path, ["q", "answer"])


def test_a_record_without_any_field_is_named(read: Read, tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", [{"q": "one"}, {}])
    with refused(f"Record 2 of {path} has no 'q', only empty fields."):
        read(path, ["q"])


@pytest.mark.parametrize("name", ["a.txt", "a", "a.json.gz"])
def test_an_unknown_ending_is_refused(name: str, read: Read, tmp_path: Path) -> None:
    (tmp_path / name).write_text("[]")
    with refused(f"{tmp_path / name} is none of .json, .jsonl, .csv, .parquet."):
        read(tmp_path / name)


@pytest.mark.parametrize("name", ["a.json", "a.parquet"])
def test_a_missing_file_is_named(name: str, read: Read, tmp_path: Path) -> None:
    with refused(f"{tmp_path / name} does not exist."):
        read(tmp_path / name)


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
    text: bytes, line: int, name: str, read: Read, tmp_path: Path
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
    text: bytes, line: int, read: Read, tmp_path: Path
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
    name: str, text: bytes, kind: str, read: Read, tmp_path: Path
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
    name: str, text: str, read: Read, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(text)
    with refused(f"{tmp_path / name} holds no record."):
        read(tmp_path / name)


# Data sets in folders -----------------------------------------------------------------------------

SOURCE = Source(
    ("train.json", "train/*.jsonl", "*train*.parquet"), "owner/name", "train", required=("q",)
)


def test_the_first_pattern_that_matches_is_read(tmp_path: Path) -> None:
    cache = str(tmp_path / "cache")
    folder = tmp_path / "data"
    write(folder / "x-train-1.parquet", ROWS[:1])
    assert SOURCE.read(str(folder), cache) == ROWS[:1]
    write(folder / "train" / "b.jsonl", ROWS[2:])
    write(folder / "train" / "a.jsonl", ROWS[:2])
    assert SOURCE.there(str(folder)) == [folder / "train" / "a.jsonl", folder / "train" / "b.jsonl"]
    assert SOURCE.read(str(folder), cache) == ROWS
    write(folder / "train.json", ROWS[1:])
    assert SOURCE.read(str(folder), cache) == ROWS[1:]


def test_several_files_come_in_the_order_of_their_names(tmp_path: Path) -> None:
    for i in (2, 0, 1):
        write(tmp_path / f"train-{i}.parquet", ROWS[i : i + 1])
    assert SOURCE.read(str(tmp_path), str(tmp_path / "cache")) == ROWS


def test_the_file_with_a_broken_record_is_named(tmp_path: Path) -> None:
    write(tmp_path / "train" / "a.jsonl", ROWS)
    second = write(tmp_path / "train" / "b.jsonl", [*ROWS, {"n": 4}])
    with refused(f"Record 4 of {second} has no 'q', only n."):
        SOURCE.read(str(tmp_path), str(tmp_path / "cache"))


def test_a_missing_folder_or_file_is_told_with_what_would_do(tmp_path: Path) -> None:
    files = "train.json or train/*.jsonl or *train*.parquet"
    do = "give the folder of the data, or null for owner/name of the hub."
    with refused(f"data.data_dir '{tmp_path}' holds no {files}; {do}"):
        SOURCE.read(str(tmp_path))
    missing = tmp_path / "none"
    with refused(f"data.data_dir '{missing}' is no folder that holds a {files}; {do}"):
        SOURCE.read(str(missing))
    assert SOURCE.there(str(missing)) == SOURCE.there(None) == []


# Data sets of the hub -----------------------------------------------------------------------------


def online(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)


@pytest.fixture
def out_of_order() -> Iterator[tuple[str, list[str]]]:
    """A hub that gives nothing, and the paths it was asked for."""
    asked: list[str] = []

    class Refusing(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(503)

        do_HEAD = do_POST = do_GET

        def log_message(self, *args: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Refusing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()


def test_a_hub_that_gives_nothing_is_asked_once(
    out_of_order: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    endpoint, asked = out_of_order
    online(monkeypatch, endpoint)
    with refused(
        "owner/name (train) cannot be loaded from the hub (…503…); data.data_dir takes a folder "
        "instead."
    ):
        SOURCE.read(None, str(tmp_path))
    assert [p for p in asked if "owner" in p] == ["/api/datasets/owner/name"]


def test_without_a_network_nothing_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    online(monkeypatch, "http://127.0.0.1:9")
    begun = time.perf_counter()
    with refused("owner/name (train) cannot be loaded from the hub (…); data.data_dir takes …"):
        SOURCE.read(None, str(tmp_path))
    assert time.perf_counter() - begun < 15


def test_offline_the_cache_alone_is_looked_in(
    out_of_order: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    endpoint, asked = out_of_order
    online(monkeypatch, endpoint)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with refused("owner/name (train) cannot be loaded from the hub (…Offline…); data.data_dir …"):
        SOURCE.read(None, str(tmp_path))
    assert not [p for p in asked if "owner" in p]


def test_what_the_hub_gives_is_checked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def load(*args: Any, **kwargs: Any) -> datasets.Dataset:
        assert (args, kwargs) == (("o/n", "main"), {"split": "test", "cache_dir": str(tmp_path)})
        return datasets.Dataset.from_list([*ROWS, {"q": "", "n": None}])

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.load_dataset", load)
    source = Source(("*.json",), "o/n", "test", "main", ("q",))
    assert source.read(None, str(tmp_path)) == [*ROWS, {"q": "", "n": None}]
    with refused("Record 4 of o/n has no 'n', only q."):
        Source(("*.json",), "o/n", "test", "main", ("n",)).read(None, str(tmp_path))
