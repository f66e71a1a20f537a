"""A user's regular expression matches as Python's does, and never for long."""

from __future__ import annotations

import re
import time
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_peft.errors import UserError
from lightning_peft.patterns import SECONDS, Pattern, as_regex_reads

PIECES = (*".ab*+?{}[]()^$|\\,12-:<=e", r"\.", r"\d", r"\w", "[^", "[]", "{2}", "{1,}", "{,2}",
          "{,}", "(?:", "(?=", "[:alpha:]", "[a", "a{e}", "{e<=1}", r"\N{DIGIT ONE}")  # fmt: skip
TEXTS = ("", "a", "b", "ab", "a.b", "aab", "a{", "1a{e}", "[a:", "a.a.b12", ":]", "a{2}", "[]", "1")


@given(st.lists(st.sampled_from(PIECES), max_size=9).map("".join))
@settings(derandomize=True, deadline=None, max_examples=600)
def test_what_re_takes_means_the_same(text: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            theirs = re.compile(text)
        except (re.error, OverflowError):
            with pytest.raises(UserError, match="is not a regular expression"):
                Pattern(text, "target_modules")
            return
    ours = Pattern(text, "target_modules")
    for name in TEXTS:
        for how in ("match", "fullmatch"):
            a, b = getattr(theirs, how)(name), getattr(ours, how)(name)
            assert (a and a.span()) == (b and b.span()), (text, name)


@pytest.mark.parametrize(
    ("text", "read"),
    [
        (r"model\.layers\.\d+\.(q|v)_proj", r"model\.layers\.\d+\.(q|v)_proj"),
        ("a{2}b{2,}c{1,3}", "a{2}b{2,}c{1,3}"),
        ("a{,2}b{,}", "a{0,2}b{0,}"),
        ("a{e<=1}", r"a\{e<=1}"),
        (r"\{\N{DIGIT ONE}", r"\{\N{DIGIT ONE}"),
        ("[[:alpha:]]", r"[\[:alpha:]]"),
        ("[^][{]", r"[^]\[{]"),
    ],
)
def test_what_the_two_libraries_read_otherwise_is_rewritten(text: str, read: str) -> None:
    assert as_regex_reads(text) == read


@pytest.mark.parametrize("text", ["(a+)+$", "(.*)*(.*)*Q"])
def test_one_that_takes_exponential_time_in_python_is_decided(text: str) -> None:
    began, pattern = time.thread_time(), Pattern(text, "target_modules")
    assert all(pattern.fullmatch("a" * 60 + "b") is None for _ in range(100))
    assert time.thread_time() - began < SECONDS


@pytest.mark.parametrize("text", ["(.|..|...)+[A-Z]", "(?P<a>(.|..)+)+(?P=a)[A-Z]"])
def test_one_that_takes_too_long_is_refused(text: str) -> None:
    began, pattern = time.thread_time(), Pattern(text, "target_modules")
    with pytest.raises(UserError) as caught:
        pattern.fullmatch("model.layers.0.self_attn.q_proj" * 2)
    assert str(caught.value) == (
        f"target_modules: the regular expression {text!r} takes longer than 2 s; a repetition of "
        "a repetition, as in (a+)+, does that, and a plain one would do."
    )
    assert time.thread_time() - began < 2 * SECONDS


def test_the_time_is_that_of_all_names_together() -> None:
    pattern = Pattern("(.|..|...)+[A-Z]", "exclude_modules")
    names = ["model.layers.0.q"[:length] for length in range(16)] * 1000

    def match_all() -> None:
        for name in names:
            pattern.fullmatch(name)

    with pytest.raises(UserError, match="exclude_modules: the regular .* takes longer than 2 s"):
        match_all()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[", "unterminated character set"),
        ("a{99999999999}", "the repetition number is too large"),
        ("(" * 5000 + ")" * 5000, "nested too deeply"),
    ],
)
def test_one_that_is_none_is_refused_with_its_key(text: str, reason: str) -> None:
    with pytest.raises(UserError, match=f"^alpha_pattern: .* is not a regular .*: {reason}") as e:
        Pattern(text, "alpha_pattern", "(.*)({})$")
    assert len(str(e.value)) < 250
