"""Records from folders and the hub, and the one sentence for whatever is wrong with them."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import datasets
import pytest

from lightning_peft.datamodules.loading.records import RecordFiles, Source
from lightning_peft.errors import UserError

# Data sets in folders -----------------------------------------------------------------------------

SOURCE = Source(
    ("train.json", "train/*.jsonl", "*train*.parquet"), "owner/name", "train", required=("q",)
)


def test_the_first_pattern_that_matches_is_read(
    tmp_path: Path, texts: Any, write_rows: Any
) -> None:
    cache = str(tmp_path / "cache")
    folder = tmp_path / "data"
    write_rows(folder / "x-train-1.parquet", texts[:1])
    assert SOURCE.read(str(folder), cache) == texts[:1]
    write_rows(folder / "train" / "b.jsonl", texts[2:])
    write_rows(folder / "train" / "a.jsonl", texts[:2])
    assert SOURCE.there(str(folder)) == [folder / "train" / "a.jsonl", folder / "train" / "b.jsonl"]
    assert SOURCE.read(str(folder), cache) == texts
    write_rows(folder / "train.json", texts[1:])
    assert SOURCE.read(str(folder), cache) == texts[1:]


def test_several_files_come_in_the_order_of_their_names(
    tmp_path: Path, texts: Any, write_rows: Any
) -> None:
    for i in (2, 0, 1):
        write_rows(tmp_path / f"train-{i}.parquet", texts[i : i + 1])
    assert SOURCE.read(str(tmp_path), str(tmp_path / "cache")) == texts


def test_the_file_with_a_broken_record_is_named(
    tmp_path: Path, texts: Any, write_rows: Any, refused: Any
) -> None:
    write_rows(tmp_path / "train" / "a.jsonl", texts)
    second = write_rows(tmp_path / "train" / "b.jsonl", [*texts, {"n": 4}])
    with refused(f"Record 4 of {second} has no 'q', only n."):
        SOURCE.read(str(tmp_path), str(tmp_path / "cache"))


def test_a_missing_folder_or_file_is_told_with_what_would_do(tmp_path: Path, refused: Any) -> None:
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
    out_of_order: tuple[str, list[str]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    refused: Any,
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
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, refused: Any
) -> None:
    online(monkeypatch, "http://127.0.0.1:9")
    begun = time.perf_counter()
    with refused("owner/name (train) cannot be loaded from the hub (…); data.data_dir takes …"):
        SOURCE.read(None, str(tmp_path))
    assert time.perf_counter() - begun < 15


def test_offline_the_cache_alone_is_looked_in(
    out_of_order: tuple[str, list[str]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    refused: Any,
) -> None:
    endpoint, asked = out_of_order
    online(monkeypatch, endpoint)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with refused("owner/name (train) cannot be loaded from the hub (…Offline…); data.data_dir …"):
        SOURCE.read(None, str(tmp_path))
    assert not [p for p in asked if "owner" in p]


def test_what_the_hub_gives_is_checked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, texts: Any, refused: Any
) -> None:
    def load(*args: Any, **kwargs: Any) -> datasets.Dataset:
        assert (args, kwargs) == (("o/n", "main"), {"split": "test", "cache_dir": str(tmp_path)})
        return datasets.Dataset.from_list([*texts, {"q": "", "n": None}])

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.load_dataset", load)
    source = Source(("*.json",), "o/n", "test", "main", ("q",))
    assert source.read(None, str(tmp_path)) == [*texts, {"q": "", "n": None}]
    with refused("Record 4 of o/n has no 'n', only q."):
        Source(("*.json",), "o/n", "test", "main", ("n",)).read(None, str(tmp_path))


# Files of the hub ---------------------------------------------------------------------------------


def test_files_of_the_hub_are_fetched_and_read_like_ones_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, write_rows: Any, refused: Any
) -> None:
    rows = [{"q": "2020-01-01", "n": 1}, {"q": "00501", "n": 2.5}]
    path = write_rows(tmp_path / "a.json", rows)

    def fetch(name: str, file: str, **options: Any) -> str:
        assert (name, options) == ("o/n", {"repo_type": "dataset", "cache_dir": None})
        if file != "a.json":
            raise FileNotFoundError(f"no {file}\nanywhere")
        return str(path)

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetch)
    files = RecordFiles("o/n")
    assert files.has("a.json")
    assert not files.has("b.json")
    assert repr(files.read("a.json", ["q"])) == repr(rows)
    with refused(f"Record 1 of {path} has no text in 'n' but the number 1; write it as a text, …"):
        files.read("a.json", ["q", "n"])
    with refused(
        "o/n/b.json cannot be loaded from the hub (no b.json); data.data_dir takes a folder inst…"
    ):
        files.read("b.json", ["q"])


def test_code_that_lies_with_data_is_not_run(tmp_path: Path, texts: Any, write_rows: Any) -> None:
    """`datasets` 3 took a script named like its folder for the way to load it; 4 has none."""
    made = tmp_path / "made"
    folder = tmp_path / "own" / "data"
    write_rows(folder / "train.json", texts)
    for name in ("data.py", "train.py", "__init__.py"):
        (folder / name).write_text(f"import os; os.mkdir({str(made)!r})\n")
    assert SOURCE.read(str(folder), str(tmp_path / "cache")) == texts
    (folder / "train.json").unlink()
    with pytest.raises(UserError, match="holds no train.json or"):
        SOURCE.read(str(folder))
    script = Source((), str(folder / "data.py"), "train")
    with pytest.raises(UserError, match=r"data\.py \(train\) cannot be loaded from the hub \("):
        script.read(None, str(tmp_path / "cache"))
    assert not made.exists()


def test_a_folder_that_cannot_be_looked_up_is_named(refused: Any) -> None:
    folder = "x" * 300
    sentence = f"{folder} cannot be read (File name too long)."
    with refused(sentence):
        SOURCE.read(folder)
    with refused(sentence):
        RecordFiles(folder)
