"""The first setting that is wrong is named as the user wrote it."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from jsonargparse import ArgumentParser

from lightning_peft.settings.diagnosis import diagnose, shorten


class Part:
    def __init__(self, size: int, name: str = "a") -> None:
        pass


class Larger(Part):
    def __init__(self, size: int, factor: float = 2.0) -> None:
        pass


@pytest.fixture
def parser() -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_argument("--steps", type=int, default=1)
    parser.add_subclass_arguments(Part, "part")
    return parser


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--part Larger --part.size 1", None),
        ("--part Larger", "part.size is missing: Larger needs it."),
        ("", "part is missing: give --part (one of Larger) or a --config with it."),
        ("--part Larger --part.name b", "part.name is no argument of Larger; there are fac"),
        ("--part Largr", "part: 'Largr' is no Part; did you mean Larger?"),
        ("--part Larger --part.size x", "part.size: 'x' is no int."),
        ("--part fractions.Fraction", "part: 'fractions.Fraction' is no Part; there are Larger."),
        ("--step 1", "step is unknown; did you mean steps?"),
        ("--steps 1.5", "steps: '1.5' is no int."),
        ("--part Part --part.size 1 --part.name '{a: 1}'", "part.name takes a text, but YAML"),
        ("--config f.yaml", "f.yaml: steps: 'many' is no int."),
        ("--config no.yaml", "--config: the file no.yaml does not exist."),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_sentence(
    parser: ArgumentParser, tmp_path: Path, words: str, sentence: str | None
) -> None:
    (tmp_path / "f.yaml").write_text("steps: many")
    found = diagnose(parser, shlex.split(words), tmp_path)
    assert found == sentence or (found or "").startswith(sentence or "?")


def test_a_later_file_may_mend_what_an_earlier_one_lacks(
    parser: ArgumentParser, tmp_path: Path
) -> None:
    (tmp_path / "a.yaml").write_text("part: {class_path: Larger}")
    (tmp_path / "b.yaml").write_text("part: {init_args: {size: 1}}")
    assert diagnose(parser, ["--config", "a.yaml", "--config", "b.yaml"], tmp_path) is None


def test_a_message_of_many_lines_becomes_keys_and_reasons() -> None:
    message = """Parser key "model":
  Does not validate against any of the Union subtypes
  Subtypes: [A, B]
  Errors:
    Parser key "r": Expected a <class 'int'>
    - Expected a <class 'NoneType'>
  Given value: x"""
    assert shorten(message) == "model.r: Expected a <class 'int'>"
    assert shorten("plain\nlines") == "plain lines"
    assert shorten("x" * 500) == "x" * 400 + " …"
