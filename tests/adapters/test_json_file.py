"""A file of JSON is one object with each key once, or one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_peft.adapters.json_file import read_json


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b'{"r": 1, "r": 2}', "f.json has the key 'r' twice; which counts is not said"),
        (b'{"a": {"q": 1, "q": 1}}', "f.json has the key 'q' twice"),
        (b"[1]", r"f.json holds \[1\], and not an object of keys and values"),
        (b"null", "f.json holds None, and not an object"),
        (b"{", "f.json is not JSON: Expecting property name"),
        (b"", "f.json is not JSON: Expecting value"),
        (b"[" * 100_000, "f.json is not JSON: nested too deeply"),
        (b'{"r": ' + b"9" * 5000 + b"}", "f.json is not JSON: Exceeds the limit"),
        ('{"r": 1}'.encode("utf-16"), r"f.json is not UTF-8 \(byte 0\), so it is not JSON"),
        (b'\xef\xbb\xbf{"r": 1}', "f.json is not JSON: Unexpected UTF-8 BOM"),
    ],
)
def test_anything_else_is_refused(content: bytes, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "f.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=sentence) as caught:
        read_json(path)
    assert "\n" not in str(caught.value)


def test_an_object_is_read(tmp_path: Path) -> None:
    path = tmp_path / "f.json"
    path.write_text('{"r": 1, "a": {"r": 2}}')
    assert read_json(path) == {"r": 1, "a": {"r": 2}}
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        read_json(tmp_path / "no.json")
