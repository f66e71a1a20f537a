"""Configurations are read by one reader, which refuses what YAML would let through."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonargparse import ArgumentParser

from lightning_peft.errors import UserError
from lightning_peft.settings.reading import (
    MODE,
    Unreadable,
    is_file,
    read_file,
    read_yaml,
    refuse_endless_words,
)

ANCHORS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n"
    for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
ENDLESS = "stand for more than 100,000 values"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a: 1\nb: 2\na: 3", "'a' stands in line 1 and again in line 3; each key once"),
        ("a: {b: {c: 1}}\nd: 1\na:\n  b: 2", "'a' stands in line 1 and again in line 3"),
        ("x: {y: [{z: 1, w: 2, z: 3}]}", r"'x.y.\[0\].z' stands in line 1 and again"),
        ('a: 1\n"a": 2', "'a' stands in line 1"),
        ("a.b: 1\na: {b: 2}", "'a.b' stands in line 1 and again in line 2"),
        ("m: {class_path: A, init_args: {r: 1}}\nm.r: 2", "'m.r' stands in line 1 and again"),
        ("m: {class_path: A}\nm: B", "'m' stands in line 1 and again in line 2"),
        ("m.n: A\nm: {init_args: {n: {class_path: B}}}", "'m.n' stands in line 1 and again"),
        (ANCHORS, ENDLESS),
        ("a: &a [*a]", ENDLESS),
        ("a: &a {b: *a}", ENDLESS),
        ("a: " + "[" * 41 + "]" * 41, "line 1 lies more than 40 levels deep"),
        ("steps: |\n  " + ANCHORS.replace("\n", "\n  "), "the text in line 1: .*100,000 values"),
        ("steps: '" + "{a: " * 60 + "}" * 60 + "'", "the text in line 1: line 1 lies more than"),
        ("steps: " + "9" * 5000, "Exceeds the limit .4300 digits."),
    ],
)
def test_what_yaml_lets_through_is_refused(text: str, sentence: str) -> None:
    began = time.perf_counter()
    with pytest.raises(Unreadable, match=sentence):
        read_yaml(text)
    assert time.perf_counter() - began < 2


@pytest.mark.parametrize("text", ["[" * 100_000, "!!python/object/apply:os.system ['true']"])
def test_what_is_no_yaml_is_an_error_of_yaml(text: str) -> None:
    with pytest.raises(yaml.YAMLError):
        read_yaml(text)


@pytest.mark.parametrize(
    ("text", "content"),
    [
        ("a: &a {x: 1}\nb: {<<: *a, x: 2}\nc: *a", {"a": {"x": 1}, "b": {"x": 2}, "c": {"x": 1}}),
        ("a: 2020-01-01\nb: 1e-3\nc: 1_000", {"a": "2020-01-01", "b": 1e-3, "c": 1000}),
        ("- {a: 1}\n- {a: 2}", [{"a": 1}, {"a": 2}]),
        ("a.b: 1\na: {c: 2}", {"a.b": 1, "a": {"c": 2}}),
        ("m: {class_path: A, init_args: {class_path: B}}", None),
        ("{name}", "{name}"),
        ("", None),
        ("7", 7),
    ],
)
def test_what_says_one_thing_is_read(text: str, content: Any) -> None:
    if content is None and text:
        with pytest.raises(Unreadable):  # of what class m is, it says two things
            read_yaml(text)
        return
    assert (read_yaml(text) or None) == content


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "--config: the file f.yaml does not exist."),
        (b"a: [", "f.yaml, line 1 is not valid YAML: "),
        (b"a: \x07", "f.yaml is not valid YAML: control characters are not allowed"),
        (b"- 1", "f.yaml holds no keys, it is a list; settings are key: value."),
        (b"word", "f.yaml holds no keys, it is nothing but a word;"),
        (b"", "f.yaml holds no keys, it is nothing; "),
        (b"# nothing\n", "f.yaml holds no keys, it is nothing"),
        (b"a: 1\nb: \xff", "f.yaml is no text, so it is no YAML: line 2 is not in UTF-8."),
        ("a: 1".encode("utf-16"), "f.yaml is no text, so it is no YAML: line 1"),
        (b"a: 1\na: 2", "f.yaml: 'a' stands in line 1 and again in line 2; each key once."),
        (ANCHORS.encode(), f"f.yaml: its anchors .*{ENDLESS}."),
    ],
)
def test_a_file_that_is_no_settings_is_refused(
    tmp_path: Path, content: bytes | None, sentence: str
) -> None:
    if content is not None:
        (tmp_path / "f.yaml").write_bytes(content)
    with pytest.raises(UserError, match=sentence) as error:
        read_file("f.yaml", tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        (".", "--config: . is a folder; give a file of settings."),
        ("/dev/null", "--config: /dev/null is no file; give a file of settings."),
        ("f.yaml/g.yaml", "--config: the file f.yaml/g.yaml does not exist."),
        ("x" * 300, "x … cannot be read .File name too long."),
        ("x/" * 3000, "x/ … cannot be read .File name too long."),
        ("a\0b", "cannot be read|does not exist"),
    ],
)
def test_a_path_of_no_file_is_refused(tmp_path: Path, path: str, sentence: str) -> None:
    (tmp_path / "f.yaml").write_text("a: 1")
    with pytest.raises(UserError, match=sentence) as error:
        read_file(path, tmp_path)
    assert len(str(error.value)) < 300
    if path != "/dev/null":
        assert not is_file(tmp_path / path)


def test_a_file_that_may_not_be_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path) -> bytes:  # root may read everything
        raise PermissionError(13, "Permission denied")

    (tmp_path / "f.yaml").write_text("a: 1")
    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(UserError, match=r"^data: f.yaml cannot be read \(Permission denied\).$"):
        read_file("f.yaml", tmp_path, "data")


def test_a_file_is_read_from_the_folder_and_may_begin_with_a_mark(tmp_path: Path) -> None:
    (tmp_path / "f.yaml").write_bytes(b"\xef\xbb\xbfa: {b: 1}")
    assert read_file("f.yaml", tmp_path) == {"a": {"b": 1}}
    assert is_file(tmp_path / "f.yaml")


def test_words_without_end_are_refused() -> None:
    refuse_endless_words(["--a", "x & y * z", "--b={c: 1}", "-1"])
    with pytest.raises(UserError, match=ENDLESS):
        refuse_endless_words(["--a=b: &b [*b, 1]"])
    with pytest.raises(UserError, match="40 levels deep"):
        refuse_endless_words(["--a", "[" * 50 + "]" * 50])


def test_jsonargparse_reads_through_the_same_reader(tmp_path: Path) -> None:
    parser = ArgumentParser(exit_on_error=False, parser_mode=MODE)
    parser.add_argument("--config", action="config")
    parser.add_argument("--a", type=dict)
    (tmp_path / "f.yaml").write_text("a: {b: 1}\na: {b: 2}")
    with pytest.raises(Exception, match="'a' stands in line 1 and again in line 2"):
        parser.parse_args(["--config", str(tmp_path / "f.yaml")])
    with pytest.raises(Exception, match="Expected a <class 'dict'>"):
        parser.parse_args(["--a", "{b: 1, b: 2}"])
    assert parser.parse_args(["--a", "{b: 1e-3}"]).a == {"b": 0.001}
