r"""Answers are found in any text at all: nothing raises, and nothing takes long."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_peft.datamodules.arithmetic import ArithmeticDataModule
from lightning_peft.datamodules.code.programs import extract_code, humaneval_program, mbpp_program
from lightning_peft.datamodules.commonsense import KIND, LABELS, CommonsenseDataModule
from lightning_peft.datamodules.conversation.mt_bench import rating
from lightning_peft.datamodules.math import answers
from lightning_peft.datamodules.math.equivalence import normalized, same_math
from lightning_peft.models.generation import cut_at

FAST = settings(derandomize=True, deadline=None, max_examples=120)
LONG = 100_000
SECONDS = 2.0
PROBLEM = {"prompt": "def f():\n", "entry_point": "f", "test": "def check(f): pass"}

# Text of what the rules look for, joined in any order; and any text.
PIECES = st.sampled_from(
    [*"0123456789-+.,/ \n$ABE`\\{}[]=%", "```", "```python\n", "The answer is: ", "#### ", ".\n"]
    + [
        "\\boxed",
        "\\fbox{",
        "\\frac",
        "\\sqrt",
        "\\text{ ",
        "answer",
        "answer1",
        "true",
        "Rating: [[",
    ]
    + [
        "if __name__",
        "assert",
        "# Example usage",
        "def f(",
        "\u0663",
        "\u00b2",
        "\ud800",
        "\0",
        "\r",
    ]
)
TEXTS = st.lists(PIECES, max_size=25).map("".join) | st.text(max_size=60)

commonsense, arithmetic = CommonsenseDataModule("x"), ArithmeticDataModule()
RULES: dict[str, Callable[[str], Any]] = {
    "gsm8k": answers.extract_gsm8k,
    "math": answers.extract_math,
    "last number": answers.last_number,
    "choice": answers.first_choice,
    "boxed": answers.boxed,
    "same integer": lambda text: answers.same_integer(text, text),
    "same number": lambda text: answers.same_number(text, text),
    "same math": lambda text: same_math(text, text),
    "label": lambda text: commonsense.extract(text, "boolq"),
    "kind": lambda text: bool(KIND.search(text)),
    "sum": lambda text: arithmetic.extract(text, "subtraction"),
    "program": extract_code,
    "humaneval": lambda text: humaneval_program(extract_code(text), PROBLEM),
    "mbpp": lambda text: mbpp_program(extract_code(text), {"test_list": ["assert f()"]}),
    "rating": rating,
    "stop": lambda text: cut_at(text, ("Question:", "Response")),
}


@pytest.mark.parametrize("name", RULES)
@FAST
@given(text=TEXTS)
def test_no_text_raises(name: str, text: str) -> None:
    found = RULES[name](text)
    assert found is None or isinstance(found, str | bool | float)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize(
    "piece",
    ["1", "1,", "1.", "1x", "-", "```", "```\n", "``` ", "`", "[[1", "[1", "[", " ", "\n", "{", "$"]
    + [
        "\\boxed{",
        "\\frac",
        "\\sqrt",
        "\\text{ ",
        "/",
        "=",
        "answer",
        "The answer is: 1",
        "A",
        ".\n",
        "if ",
    ],
)
def test_a_long_text_takes_a_moment(name: str, piece: str) -> None:
    text = piece * (LONG // len(piece))
    begun = time.perf_counter()
    for hostile in (text, f"The answer is: {text}x", f"[[{text}x", f"```python\n{text}"):
        RULES[name](hostile)
    assert time.perf_counter() - begun < SECONDS


# Against simple references ------------------------------------------------------------------------

NUMBER = re.compile(r"[-+]?\d*[.,/]?\d+")  # as MetaMath writes it


@FAST
@given(TEXTS)
def test_metamaths_numbers_are_found_as_its_pattern_finds_them(text: str) -> None:
    found = NUMBER.search(text)
    wanted = found.group() if found and answers.MARKER not in text else None
    if answers.MARKER not in text:
        assert answers.extract_gsm8k(answers.MARKER + text) == wanted


@FAST
@given(st.text(alphabet="0123456789-+.,/x", max_size=12))
def test_every_run_of_digits_and_marks_is_read_as_its_pattern_reads_it(text: str) -> None:
    found = NUMBER.search(text)
    assert answers.extract_gsm8k(answers.MARKER + text) == (found.group() if found else None)
    assert answers.same_integer(text, text) <= bool(NUMBER.fullmatch(text.replace(",", "")))


@FAST
@given(st.integers(-(10**9), 10**9), st.text(alphabet="abc .\n", max_size=20))
def test_an_integer_is_found_where_it_is_said(number: int, before: str) -> None:
    assert answers.extract_gsm8k(f"{before}{answers.MARKER}{number}") == str(number)
    assert answers.last_number(f"{before}{number}") == str(number)
    assert answers.same_integer(f"{number:,}", str(number))
    assert not answers.same_integer(str(number), str(number + 1))
    assert answers.boxed(f"{before}\\boxed{{{number}}}") == str(number)
    assert rating(f"{before}[[{abs(number)}]]") == abs(number)


@FAST
@given(TEXTS, st.sampled_from(sorted(LABELS)))
def test_a_label_is_the_first_that_stands_in_a_text(text: str, task: str) -> None:
    places = {label: text.find(label) for label in LABELS[task] if label in text}
    wanted = min(places, key=lambda label: places[label]) if places else None
    assert commonsense.extract(text, task) == wanted
    assert wanted is None or commonsense.extract(wanted, task) == wanted


@FAST
@given(TEXTS)
def test_what_was_found_is_found_again_in_itself(text: str) -> None:
    for rule in (answers.last_number, answers.first_choice):
        found = rule(text)
        assert found is None or rule(found) == found
    found = answers.extract_gsm8k(text)
    assert found is None or answers.extract_gsm8k(answers.MARKER + found) == found
    stopped = cut_at(text, ("true", "\n"))
    assert cut_at(stopped, ("true", "\n")) == stopped
    assert text.startswith(stopped)


@FAST
@given(TEXTS)
def test_a_program_is_part_of_its_text_and_a_fenced_one_comes_first(text: str) -> None:
    assert extract_code(text) in text
    plain = text.replace("`", "").replace("assert", "").replace("if __name__", "")
    plain = plain.replace("# Example usage", "")
    assert extract_code(f"a\n```\nb\n```\n```python\n{plain}```") == plain


@FAST
@given(TEXTS)
def test_normalising_twice_raises_nothing_that_once_does_not(text: str) -> None:
    try:
        once = normalized(text)
    except (IndexError, ValueError):
        return
    assert same_math(once, once)
