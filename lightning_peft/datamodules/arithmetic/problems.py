"""Arithmetic problems as numbers: their answers, texts and characters, and how they are split.

A problem is ``operator · 10⁶ + a · 10³ + b``, where the operator counts in its task's list; a pair
is ``a · 10³ + b``. Everything works on arrays of them: a million needs no Python objects.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lightning_peft.datamodules.loading.examples import Example

BASE = 1000
PAIRS = BASE * BASE
NAMES = {"-": "subtraction", "%": "reversed", "&": "minimum", "^": "carryless"}
PLACES = np.array([100, 10, 1])
PROMPT_LENGTH = 8
ANSWER_LENGTH = 4


def answers(operators: str, problems: np.ndarray) -> np.ndarray:
    """Compute answers.

    Args:
        operators: The task's operators, in the order that problems number them in.
        problems: Problem numbers `(n,)`.

    Returns:
        Answers `(n,)`, from -999 to 999.
    """
    symbols = np.array(list(operators))[problems // PAIRS]
    left, right = problems % PAIRS // BASE, problems % BASE
    digits = np.stack([left, right])[:, :, None] // PLACES % 10  # (2, n, 3)
    return np.select(
        [symbols == "-", symbols == "%", symbols == "&"],
        [left - right, right - left, digits.min(axis=0) @ PLACES],
        digits.sum(axis=0) % 10 @ PLACES,
    )


def answer_text(answer: int) -> str:
    """Write an answer in four characters: ``-875``, ``0875``."""
    return f"{answer:04d}"


def prompt_text(operators: str, problem: int) -> str:
    """Write a problem: ``042-917=``."""
    operator, pair = divmod(problem, PAIRS)
    return f"{pair // BASE:03d}{operators[operator]}{pair % BASE:03d}="


def write_examples(operators: str, problems: np.ndarray, indices: Sequence[int]) -> list[Example]:
    """Write problems as examples with the given indices."""
    return [
        Example(prompt_text(operators, problem), text, NAMES[operators[problem // PAIRS]], i, text)
        for problem, text, i in zip(
            problems.tolist(),
            map(answer_text, answers(operators, problems).tolist()),
            map(int, indices),
            strict=True,
        )
    ]


def characters(operators: str, problems: np.ndarray) -> np.ndarray:
    """Write problems with their answers as ASCII codes `(n, 12)`, without a Python string each."""
    zero, found = ord("0"), answers(operators, problems)
    symbols = np.array([ord(operator) for operator in operators])[problems // PAIRS]
    left, right = problems % PAIRS // BASE, problems % BASE
    return np.concatenate(
        [
            zero + left[:, None] // PLACES % 10,
            symbols[:, None],
            zero + right[:, None] // PLACES % 10,
            np.full_like(left, ord("="))[:, None],
            np.where(found < 0, ord("-"), zero)[:, None],
            zero + np.abs(found)[:, None] // PLACES % 10,
        ],
        axis=1,
    )


def split_pairs(
    split_seed: int, test_size: int, val_size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Split the million pairs so that none is held out in one order and trained on in the other.

    Returns:
        Pair numbers ``1000 a + b`` of the test, validation and training set; the last is all the
        rest, ascending.
    """
    rng = np.random.default_rng(split_seed)
    drawn: list[int] = []
    unordered: set[tuple[int, int]] = set()
    while len(drawn) < test_size + val_size:
        pair = int(rng.integers(PAIRS))
        key = tuple(sorted(divmod(pair, BASE)))
        if key not in unordered:
            unordered.add(key)  # type: ignore[arg-type]
            drawn.append(pair)
    held_out = np.array(drawn, dtype=np.int64)
    free = np.ones(PAIRS, dtype=bool)
    free[held_out] = free[held_out % BASE * BASE + held_out // BASE] = False
    return held_out[:test_size], held_out[test_size:], np.flatnonzero(free)
