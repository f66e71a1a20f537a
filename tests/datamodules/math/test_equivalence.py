from __future__ import annotations

import builtins
import threading
from typing import Any

import pytest

from lightning_peft.datamodules.math.answers import (
    boxed,
)
from lightning_peft.datamodules.math.equivalence import equivalent, normalized, same_math

# The string rule ----------------------------------------------------------------------------------

SAME = [
    ("5", "5"),
    ("5", " 5 "),
    ("10,\\!000", "10,000"),
    ("a\nb", "ab"),
    # Fractions in all their spellings.
    (r"\frac{1}{2}", r"\dfrac{1}{2}"),
    (r"\frac{1}{2}", r"\tfrac{1}{2}"),
    (r"\frac{1}{2}", r"\frac12"),
    (r"\frac{1}{2}", r"\frac 1 2"),
    (r"\frac{1}{72}", r"\frac1{72}"),
    (r"\frac{3}{4}i", r"\frac34i"),
    (r"\frac{a}{b}", r"\dfrac ab"),
    (r"1+\frac{1}{2}+\frac{3}{4}", r"1 + \frac12 + \tfrac34"),
    (r"\frac{\frac{1}{2}}{3}", r"\frac{\frac12}{3}"),
    (r"\\frac{1}{2}", r"\frac{1}{2}"),
    # A slash between integers.
    ("1/2", r"\frac{1}{2}"),
    ("-1/2", r"\frac{-1}{2}"),
    ("1 / 2", r"\frac12"),
    # A half, a leading zero.
    ("0.5", r"\frac{1}{2}"),
    (".5", r"\frac12"),
    ("0.5", "1/2"),
    (".25", "0.25"),
    ("x + .5y", "x+0.5y"),
    (r"\sqrt{.3}", r"\sqrt{0.3}"),
    # Roots.
    (r"\sqrt3", r"\sqrt{3}"),
    (r"2\sqrt3+\sqrt{5}", r"2\sqrt{3} + \sqrt5"),
    # The argument is read before spaces go, so that the space becomes it, and then goes.
    (r"\sqrt 3", r"\sqrt{}3"),
    # Brackets.
    (r"\left(3, \frac{\pi}{2}\right)", r"(3,\frac{\pi}{2})"),
    (r"\left[0,1\right)", "[0,1)"),
    # What has a unit.
    (r"90^\circ", "90"),
    (r"90^{\circ}", r"90^\circ"),
    (r"10\%", "10"),
    (r"\$18.90", "18.90"),
    (r"5\text{ cm}", "5"),
    (r"5 \text{ cm}^2", "5"),
    (r"5\text{ cm}", r"5\text{ inches}"),
    # A name before the value.
    ("x=5", "5"),
    ("k = 5", "5"),
    ("k=0.5", r"\frac{1}{2}"),
    ("=5", "5"),
    ("5=x", "x"),
    # Words, sets, matrices.
    (r"\text{Evelyn}", r"\text{Evelyn}"),
    (r"(-\infty, 2)\cup(3, \infty)", r"(-\infty,2) \cup (3,\infty)"),
    (
        r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}",
        r"\begin{pmatrix} 1 \ 2 \end{pmatrix}",
    ),
    # Where a step fails, equal texts are equal all the same.
    ("x/2", "x/2"),
    (r"\sqrt", r"\sqrt"),
    (r"\frac", r"\frac"),
    (r"1\text{ a}2\text{ b}", r"1\text{ a}2\text{ b}"),
    ("", ""),
    ("", r"\%"),
]
DIFFERENT = [
    ("5", "6"),
    ("5", "-5"),
    ("5", ""),
    # Equal values, but other forms than the rule knows.
    ("5", "5.0"),
    ("0.25", r"\frac{1}{4}"),
    ("0.50", r"\frac{1}{2}"),
    ("1.5", r"\frac{3}{2}"),
    ("1000", "1,000"),
    ("2/4", "1/2"),
    ("x+y", "y+x"),
    ("1, 2", "2, 1"),
    (r"\sqrt{12}", r"2\sqrt{3}"),
    (r"\sqrt 3", r"\sqrt{3}"),
    (r"-\frac{1}{2}", r"\frac{-1}{2}"),
    ("-0.5", r"-\frac{1}{2}"),
    ("a/b", r"\frac{a}{b}"),
    ("1/2x", r"\frac{1}{2}x"),
    ("1/2/3", r"\frac{1}{2}/3"),
    ("01/2", r"\frac{1}{2}"),
    # Only the first argument of \frac tells whether braces are missing.
    (r"\frac{1}2", r"\frac{1}{2}"),
    # Digits are taken one by one.
    (r"\frac112", r"\frac{11}{2}"),
    (r"\sqrt16", r"\sqrt{16}"),
    # Units that are not written as the rule expects.
    (r"5\text{cm}", "5"),
    ("5 cm", "5"),
    (r"5\mbox{ cm}", "5"),
    ("10%", r"10\%"),
    ("10%", "10"),
    ("$5$", "5"),
    ("90^o", "90"),
    # Names of more than one letter and a space, and chains.
    ("xy = 5", "5"),
    ("x = y = 5", "5"),
    (r"x \in [1,2]", "[1,2]"),
    ("C", r"\text{C}"),
    (r"\text{(C)}", "(C)"),
    ("[0,1]", "[0,1)"),
    ("Evelyn", "evelyn"),
    ("5.", "5"),
    # A step that fails on one side leaves both texts as they are.
    ("x/2", "x / 2"),
    (r"\frac12+\sqrt", r"\frac{1}{2}+\sqrt"),
    (r"1\text{ a}2\text{ b}", "1"),
]


def test_the_tables_are_large_enough_and_do_not_repeat() -> None:
    assert min(len(SAME), len(DIFFERENT)) >= 25
    assert len({*SAME, *DIFFERENT}) == len(SAME) + len(DIFFERENT)


@pytest.mark.parametrize(("one", "other"), SAME)
def test_answers_that_the_string_rule_takes_for_the_same(one: str, other: str) -> None:
    assert same_math(one, other)
    assert same_math(other, one)


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_answers_that_the_string_rule_takes_for_different(one: str, other: str) -> None:
    assert not same_math(one, other)
    assert not same_math(other, one)


def test_normal_forms() -> None:
    assert normalized(r" \left( \tfrac12 , .5 \right) ") == r"(\frac{1}{2},0.5)"
    assert normalized(r"k = 3\sqrt2 \text{ square units}") == r"3\sqrt{2}"
    assert normalized("-3/4") == r"\frac{-3}{4}"
    assert normalized(r"\frac1") == r"\frac1"
    assert normalized("") == ""


# Algebra ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("extracted", "expected", "same"),
    [
        ("0.25", r"\frac{1}{4}", True),
        (r"\sqrt{12}", r"2\sqrt{3}", True),
        ("y+x", "x+y", True),
        ("(x+1)(x-1)", "x^2-1", True),
        ("x = 5", "5", True),
        ("x/2", r"\frac{x}{2}", True),
        ("1,000", "1000", True),
        ("$5$ apples", "5", True),
        (r"\$18.9", "18.90", True),
        (r"\boxed{5}", "5", True),
        (r"\text{Evelyn}", r"\text{Evelyn}", True),
        (r"(-\infty, 2)", r"\left(-\infty,2\right)", True),
        ("5", "6", False),
        ("0.333", r"\frac{1}{3}", False),
        ("[0,1]", "[0,1)", False),
        ("x", "y", False),
        (r"\text{even}", r"\text{odd}", False),
        ("", "5", False),
        ("$", "5", False),
        (r"\frac{", "5", False),
        ("}{" * 20, "5", False),
        ("(" * 200, "5", False),
        ("the model said nothing", "5", False),
        ("\x00", "5", False),
        ("5", "", False),
    ],
)
def test_equivalence_by_algebra(extracted: str, expected: str, same: bool) -> None:
    pytest.importorskip("math_verify")
    assert equivalent(extracted, expected) is same


def test_an_endless_comparison_is_given_up() -> None:
    pytest.importorskip("math_verify")
    assert not equivalent(r"9^{9^{9^{9}}}", "1", seconds=1)


def test_equivalence_works_and_is_given_up_outside_of_the_main_thread() -> None:
    pytest.importorskip("math_verify")
    verdicts: list[bool] = []

    def judge() -> None:
        verdicts.append(equivalent(r"\sqrt{12}", r"2\sqrt{3}"))
        verdicts.append(equivalent(r"9^{9^{9^{9}}}", "1", seconds=1))
        verdicts.append(equivalent("5", "6"))

    thread = threading.Thread(target=judge)
    thread.start()
    thread.join()
    assert verdicts == [True, False, False]


def test_without_the_library_equivalence_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "math_verify":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match=r'pip install "lightning-peft\[math\]"'):
        equivalent("5", "5")


def test_no_text_raises_in_algebra(random_texts: Any) -> None:
    pytest.importorskip("math_verify")
    for text in random_texts(60, seed=2):
        assert isinstance(equivalent(text, "7", seconds=1), bool)


def test_real_answers_of_math_by_algebra(records: Any) -> None:
    pytest.importorskip("math_verify")
    golds = [boxed(record["solution"]) or "" for record in records("MATH/test.jsonl")][::3]
    assert all(equivalent(gold, gold) for gold in golds)
    shuffled = golds[7:] + golds[:7]
    assert sum(map(equivalent, golds, shuffled)) < 0.05 * len(golds)
