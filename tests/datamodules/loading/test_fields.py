"""A text where a text belongs, a number where one belongs, and one sentence for anything else."""

from __future__ import annotations

import datetime
from typing import Any

import numpy as np
import pytest

from lightning_peft.datamodules.loading.fields import (
    described,
    first_line,
    listed,
    no_list,
    number_of,
    text_if_any,
    text_in,
    texts_in,
)

DAY = datetime.date(2020, 1, 1)


def test_a_text_is_returned_as_it_is() -> None:
    record = {"q": " 00501 ", "empty": "", "none": None}
    assert text_in(record, "q", "Record 1") == " 00501 "
    assert text_in(record, "empty", "Record 1") == ""
    assert text_if_any(record, "none", "Record 1") is None
    assert text_if_any(record, "absent", "Record 1") is None


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        (None, "Record 1 has no text in 'q'; give one."),
        (5, "Record 1 has no text in 'q' but the number 5; write it as a text, \"5\"."),
        (False, "Record 1 has no text in 'q' but false; write it as a text, \"false\"."),
        ({}, "Record 1 has no text in 'q' but an object; give one text."),
        ([], "Record 1 has no text in 'q' but a list; give one text."),
        (b"a", "Record 1 has no text in 'q' but a bytes; give one text."),
        (DAY, "Record 1 has no text in 'q' but a date; give one text."),
    ],
)
def test_anything_else_is_named(value: Any, sentence: str, refused: Any) -> None:
    with refused(sentence):
        text_in({"q": value}, "q", "Record 1")


def test_texts_of_a_list(refused: Any) -> None:
    assert texts_in(["a", ""], "q", "Record 1") == ["a", ""]
    with refused("Record 1 has no list of texts in 'q' but the text 'ab'; give one."):
        texts_in("ab", "q", "Record 1")
    with refused("Record 1 has no text in 'q'; give one."):
        texts_in(["a", None], "q", "Record 1")
    with refused("Record 1 has no text in 'q' but the number 5; …"):
        texts_in(["a", 5], "q", "Record 1")


@pytest.mark.parametrize(
    ("value", "number"),
    [
        (1, 1.0),
        ("1", 1.0),
        ("-0.50", -0.5),
        (".5", 0.5),
        (" 1e2 ", 100.0),
        (np.int64(3), 3.0),
        (True, None),
        ("1_0", None),
        ("\u0661", None),  # a digit, but no ASCII
        ("nan", None),
        ("one", None),
        ("", None),
        (None, None),
        ([1], None),
        (10**400, None),
    ],
)
def test_a_number_is_one_or_is_written_in_digits(value: Any, number: float | None) -> None:
    assert number_of(value) == number


def test_what_is_long_is_not_told_whole() -> None:
    assert len(described(10**300)) < 60
    assert described("a" * 99).endswith("\N{HORIZONTAL ELLIPSIS}")
    assert first_line(ValueError("a\x0eb\nc")) == r"a\x0eb"
    assert first_line(KeyError()) == "KeyError"
    assert listed(["a", "b\n"]) == "a, 'b\\n'"
    assert len(listed(map(str, range(10_000)))) < 100
    assert no_list("q", None, "texts") == "has no list of texts in 'q' but null; give one."
