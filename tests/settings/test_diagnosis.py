"""The first setting that is wrong is named as the user wrote it."""

# ruff: noqa: E501 - a row of a table, words and sentence, reads best as one line

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from jsonargparse import ArgumentParser

from lightning_peft.errors import UserError
from lightning_peft.settings.diagnosis import diagnose, diagnose_tree, refuse_ignored, shorten


class Part:
    def __init__(self, size: int, name: str = "a") -> None:
        pass


class Larger(Part):
    def __init__(self, size: int, factor: float = 2.0) -> None:
        pass


class Group:
    def __init__(self, x: int = 1, y: int = 2) -> None:
        pass


@pytest.fixture
def parser() -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_argument("--steps", type=int, default=1)
    parser.add_subclass_arguments(Part, "part")
    parser.add_argument("--parts.many", type=list[Part] | Part | None, default=None)
    parser.add_argument("--by", type=dict[str, dict[str, float]], default={})
    parser.add_class_arguments(Group, "group")
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
        ("--steps '[1, 2]'", "steps: '[1, 2]' is no int."),
        ("--part [1]", "part: [1] is no Part; there are Larger."),
        ("--part '{class_path: null}'", "part.class_path: null names no class; there are Larger"),
        ("--part '{class_path: Larger, init_args: 5}'", "part.init_args: 5 is no mapping of keys"),
        ("--part '{class_path: Larger, init_args: {size: null}}'", "part.size is missing: Larger needs it."),
        ("--part math.floor", "part: 'math.floor' is no Part; there are Larger."),
        ("--part os.path.join", "part: 'os.path.join' is no Part; there are Larger."),
        ("--part part.yaml", "part: part.yaml: 'size' stands in line 3 and again in line 4; each"),
        ("--parts.many '[{class_path: Larger, init_args: {size: a}}]'", "parts.many.size: 'a' is no int."),
        ("--parts.many '[{class_path: Largr}]'", "parts.many: 'Largr' is no Part; did you"),
        ("--by '{a: {b: x}}'", "by.a.b: 'x' is no float."),
        ("--by '{a: 3}'", "by.a: 3 is no mapping."),
        ("--group.x 1 --group.y b", "group.y: 'b' is no int."),
        ("--group 5", "group: '5' is no mapping of keys to values; its keys are x, y."),
        ("--config no.yaml", "--config: the file no.yaml does not exist."),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_sentence(
    parser: ArgumentParser, tmp_path: Path, words: str, sentence: str | None
) -> None:
    (tmp_path / "f.yaml").write_text("steps: many")
    (tmp_path / "part.yaml").write_text("class_path: Larger\ninit_args:\n  size: 1\n  size: 2")
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


def test_a_tree_that_is_read_already_is_gone_through_too(parser: ArgumentParser) -> None:
    assert (
        diagnose_tree(parser, {"part": {"class_path": "Larger", "init_args": {"size": 1}}}) is None
    )
    beside = {"part": {"class_path": "Larger", "size": 1}}
    assert diagnose_tree(parser, beside) == (
        "part.size stands beside class_path; a class's arguments stand below init_args."
    )
    assert (diagnose_tree(parser, {"part": None}) or "").startswith("part is missing: give --part")


def test_a_group_that_is_no_group_is_refused_though_jsonargparse_passes_over_it(
    parser: ArgumentParser, tmp_path: Path
) -> None:
    for value in (".inf", "null", "[1]", "5"):
        (tmp_path / "f.yaml").write_text(f"group: {value}")
        with pytest.raises(UserError, match=r"^f.yaml: group: .* is no mapping of keys to values"):
            refuse_ignored(parser, ["--config", "f.yaml"], tmp_path)
    (tmp_path / "f.yaml").write_text("group: {x: 1}\nsteps: 3")
    refuse_ignored(parser, ["--config", "f.yaml", "--steps", "2"], tmp_path)
