from __future__ import annotations

from typing import Any

import pytest

from lightning_peft.datamodules.math.answers import (
    after_marker,
    boxed,
    extract_gsm8k,
    extract_math,
    first_choice,
    gsm8k_gold,
    last_number,
    same_integer,
    same_number,
)
from lightning_peft.datamodules.math.equivalence import same_math

IS = "The answer is: "


# Gold answers -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("2+2 = <<2+2=4>>4\n#### 4", "4"),
        ("#### 109,200,000", "109200000"),
        ("#### -12\n", "-12"),
        ("so #### 3\n#### 5", "5"),
    ],
)
def test_the_gold_answer_of_gsm8k_follows_the_mark(answer: str, gold: str) -> None:
    assert gsm8k_gold(answer) == gold


def test_an_answer_of_gsm8k_without_the_mark_is_refused() -> None:
    with pytest.raises(ValueError, match="does not end in '#### ' and a number, but in '4'"):
        gsm8k_gold("4")


@pytest.mark.parametrize(
    ("solution", "content"),
    [
        (r"so $\boxed{5}$.", "5"),
        (r"$\boxed{\frac{1}{2}}$", r"\frac{1}{2}"),
        (r"$\boxed{\sqrt{\frac{a^{2}}{b}}}$ units", r"\sqrt{\frac{a^{2}}{b}}"),
        (r"$\boxed{3}$, then $\boxed{4}$", "4"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\boxed{7}}", "7"),
        (r"\boxed{}", ""),
        (r"\boxed{ 5 }", " 5 "),
        (r"\boxed {5}", "5"),
        (r"our answer is $\boxed 2$.", "2"),
        (r"our answer is $\boxed 2$ or $3$.", "2"),
        (r"\boxed 42", "42"),
        (r"$\fbox{6}$", "6"),
        # \fbox counts only where there is no \boxed.
        (r"\boxed{5} \fbox{6}", "5"),
        # Braces after the box's own do not matter.
        (r"\boxed{5}}}", "5"),
        # An open brace is no answer, and an earlier box is not looked for.
        (r"\boxed{5", None),
        (r"\boxed{\frac{1}{2}", None),
        (r"\boxed{1} \boxed{2", None),
        (r"\boxed", None),
        (r"\boxed $5$", None),
        ("5", None),
        ("", None),
    ],
)
def test_the_gold_answer_of_math_is_the_last_box(solution: str, content: str | None) -> None:
    assert boxed(solution) == content


# MetaMath -----------------------------------------------------------------------------------------


def test_what_follows_the_last_marker_is_the_answer() -> None:
    assert after_marker(f"a {IS}1\nb {IS}2 .") == "2 ."
    assert after_marker(IS) == ""
    assert after_marker("The answer is 5") is None
    assert after_marker("the answer is: 5") is None
    assert after_marker("The answer is:5") is None


@pytest.mark.parametrize(
    ("output", "extracted", "correct"),
    [
        # (output, what is found, for which gold answer it is correct)
        (f"#### 7\n{IS}7", "7", "7"),
        (f"{IS}7.", "7", "7"),
        (f"{IS}-3", "-3", "-3"),
        (f"{IS}+3", "+3", "3"),
        (f"{IS}$18", "18", "18"),
        (f"{IS}$-18", "-18", "-18"),
        (f"{IS}-$18", "18", "18"),
        (f"{IS}x = 12 apples", "12", "12"),
        (f"{IS}1,080 dollars", "1,080", "1080"),
        (f"{IS}109200000", "109200000", "109200000"),
        (f"{IS}5.0", "5.0", "5"),
        (f"{IS}5.4", "5.4", "5"),
        (f"{IS}5.6", "5.6", "6"),
        (f"{IS}.9", ".9", "1"),
        (f"{IS}-0.4", "-0.4", "0"),
        (f"{IS}7/2.", "7/2", "4"),
        (f"{IS}10/4", "10/4", "2"),  # halves go to the even neighbour
        (f"{IS}12/4", "12/4", "3"),
        (f"{IS}-8/4", "-8/4", "-2"),
        (f"{IS}2.5", "2.5", "2"),
        (f"{IS}3.5", "3.5", "4"),
        (f"{IS}6/0", "6/0", "6"),
        (f"{IS}6/00", "6/00", "6"),
        (f"{IS}4, not 5", "4", "4"),
        (f"{IS}4\n{IS}9", "9", "9"),
        (f"{IS}9\n\nThe answer is 4", "9", "9"),
        (f"{IS}12:30", "12", "12"),
        # Read up to the second separator, as MetaMath does.
        (f"{IS}1,200,000", "1,200", "1200"),
        (f"{IS}1,200.75", "1,200", "1200"),
        # Beyond what a float holds.
        (f"{IS}12345678901234567891", "12345678901234567891", "12345678901234567891"),
        # A fraction without a numerator is found, but is no number.
        (f"{IS}a/5", "/5", None),
        (f"{IS}{'9' * 5000}", "9" * 5000, None),
        (f"{IS}five", None, None),
        (IS, None, None),
        (f"{IS}5 {IS}", None, None),
        ("The answer is 5", None, None),
        ("#### 5", None, None),
        ("", None, None),
    ],
)
def test_gsm8k_is_judged_by_the_first_number_after_the_last_marker(
    output: str, extracted: str | None, correct: str | None
) -> None:
    found = extract_gsm8k(output)
    assert found == extracted
    golds = {"-7", *map(str, range(7)), "1080", "109200000", correct or "0"}
    judged = {gold for gold in golds if found is not None and same_integer(found, gold)}
    assert judged == ({correct} if correct else set())


def test_a_number_may_have_commas_on_both_sides() -> None:
    assert same_integer("2,125", "2125")
    assert same_integer("2125", "2,125")
    assert same_integer("1200000", "1,200,000")
    assert not same_integer("2125", "2126")
    assert not same_integer("2e3", "2000")
    assert not same_integer("", "")


@pytest.mark.parametrize(
    ("output", "extracted"),
    [
        (rf"{IS}\frac{{1}}{{2}}", r"\frac{1}{2}"),
        (f"{IS}5.", "5"),
        (f"{IS}5.\nThat is all.", "5"),
        (f"{IS}5. That is all.", "5. That is all"),
        (f"{IS} 5 . ", "5"),
        (f"{IS}1.5", "1.5"),
        (f"{IS}1.5.\n", "1.5"),
        (f"{IS}5..", "5."),
        (f"{IS}5\nmore", "5\nmore"),
        (f"{IS}1.\n{IS}2.\n", "2"),
        (f"{IS}.", ""),
        (IS, ""),
        (r"\boxed{5}", None),
    ],
)
def test_math_is_judged_by_what_follows_the_last_marker(output: str, extracted: str | None) -> None:
    assert extract_math(output) == extracted


# LLM-Adapters -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("output", "number"),
    [
        ("He has 3 apples and then 7.", "7."),
        ("1,234,567 in all", "1234567"),
        ("It is -2.5", "-2.5"),
        ("8 - 3 = 5", "5"),
        ("from 3-5", "-5"),
        ("The answer is 33.0", "33.0"),
        ("3,4", "34"),
        (".5", "5"),
        ("7/2", "2"),
        ("no number", None),
        ("", None),
    ],
)
def test_the_last_number_is_the_answer(output: str, number: str | None) -> None:
    assert last_number(output) == number


@pytest.mark.parametrize(
    ("extracted", "expected", "same"),
    [
        ("8", "8.0", True),
        ("7.", "7", True),
        ("1234567", "1,234,567", True),
        ("-2.5", "-2.5", True),
        ("2.5004", "2.5", True),
        ("2.4996", "2.5", True),
        ("0.001", "0", True),
        ("2.502", "2.5", False),
        ("8", "-8", False),
        ("9" * 400, "9" * 400, False),  # infinite as floats
        ("", "0", False),
        ("eight", "8", False),
        ("8", "eight", False),
    ],
)
def test_numbers_are_the_same_within_a_thousandth(
    extracted: str, expected: str, same: bool
) -> None:
    assert same_number(extracted, expected) is same


@pytest.mark.parametrize(
    ("output", "choice"),
    [
        ("The answer is (D).", "D"),
        ("(B) or (C)", "B"),
        ("E", "E"),
        ("Both are A", "B"),
        ("F, then a", None),
        ("", None),
    ],
)
def test_the_first_choice_is_the_answer(output: str, choice: str | None) -> None:
    assert first_choice(output) == choice


# Any text, and real records -----------------------------------------------------------------------


def test_no_text_raises(random_texts: Any) -> None:
    texts = random_texts(4000)
    for text, other in zip(texts, texts[1:], strict=False):
        for found in (boxed(text), after_marker(text), extract_math(text), last_number(text)):
            assert found is None or isinstance(found, str)
        assert first_choice(text) in {None, *"ABCDE"}
        for judge in (same_math, same_integer, same_number):
            assert isinstance(judge(text, other), bool)
        number = extract_gsm8k(text)
        assert number is None or isinstance(same_integer(number, other), bool)


def test_every_text_is_the_same_as_itself_and_judged_alike_both_ways(random_texts: Any) -> None:
    texts = random_texts(2000, seed=1)
    assert all(same_math(text, text) for text in texts)
    pairs = list(zip(texts, texts[1:], strict=False))
    assert all(same_math(a, b) == same_math(b, a) for a, b in pairs)
    numbers = [n for n in map(last_number, texts) if n is not None]
    assert len(numbers) > 500
    assert all(same_number(n, n) for n in numbers)


@pytest.mark.parametrize(("split", "count"), [("train", 2000), ("test", 400)])
def test_real_answers_of_gsm8k(split: str, count: int, records: Any) -> None:
    golds = [gsm8k_gold(record["answer"]) for record in records(f"gsm8k/{split}.jsonl")]
    assert len(golds) == count
    outputs = [extract_gsm8k(f"Let's see.\n#### {gold}\n{IS}{gold}") or "" for gold in golds]
    assert all(map(same_integer, outputs, golds))
    assert sum(map(same_integer, outputs, golds[7:] + golds[:7])) < 0.03 * count


def test_real_answers_of_math(records: Any) -> None:
    golds = [boxed(record["solution"]) or "" for record in records("MATH/test.jsonl")]
    assert len(golds) == 500
    assert all(golds)
    outputs = [extract_math(f"{IS}{gold}.\n\nIs it?") or "" for gold in golds]
    assert all(map(same_math, outputs, golds))
    shuffled = golds[7:] + golds[:7]
    assert sum(map(same_math, outputs, shuffled)) < 0.03 * len(golds)


def test_real_responses_of_metamathqa(records: Any) -> None:
    rows = records("metamathqa/rows.json")
    assert len(rows) == 5
    for row in rows:
        last = row["response"].splitlines()[-1].removeprefix(IS)
        assert same_math(extract_math(row["response"]) or "", last)
        if row["type"].startswith("GSM"):
            assert same_integer(extract_gsm8k(row["response"]) or "", last)


def test_real_answers_of_the_tasks_of_llm_adapters(records: Any) -> None:
    svamp = [record["answer"] for record in records("SVAMP/test.json")]
    outputs = [last_number(f"3 and {gold}") or "" for gold in svamp]
    assert len(svamp) == 200
    assert all(map(same_number, outputs, svamp))
    assert sum(map(same_number, outputs, svamp[7:] + svamp[:7])) < 0.05 * len(svamp)
    aqua = [record["answer"] for record in records("AQuA/test.json")]
    assert [first_choice(f"The answer is ({gold}).") for gold in aqua] == aqua
