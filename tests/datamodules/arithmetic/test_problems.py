from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lightning_peft.datamodules.arithmetic.problems import (
    PAIRS,
    answer_text,
    answers,
    prompt_text,
    split_pairs,
)


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        ("042-917=", "-875"),
        ("917-042=", "0875"),
        ("000-000=", "0000"),
        ("042%917=", "0875"),
        ("917%042=", "-875"),
        ("042&917=", "0012"),
        ("042^917=", "0959"),
        ("999^999=", "0888"),
    ],
)
def test_answers_of_hand_made_problems(prompt: str, answer: str, solve: Any) -> None:
    number = "-%&^".index(prompt[3]) * PAIRS + int(prompt[:3]) * 1000 + int(prompt[4:7])
    assert prompt_text("-%&^", number) == prompt
    assert answer_text(int(answers("-%&^", np.array([number]))[0])) == answer == solve(prompt)


def test_answers_by_brute_force(solve: Any) -> None:
    problems = np.random.default_rng(0).integers(0, 4 * PAIRS, size=4000)
    texts = [answer_text(a) for a in answers("-%&^", problems).tolist()]
    assert texts == [solve(prompt_text("-%&^", p)) for p in problems.tolist()]


def test_held_out_pairs_never_train_in_either_order() -> None:
    test, val, train = (set(p.tolist()) for p in split_pairs(0, 3000, 2000))
    assert (len(test), len(val)) == (3000, 2000)

    def unordered(pairs: set[int]) -> set[tuple[int, ...]]:
        return {tuple(sorted(divmod(p, 1000))) for p in pairs}

    test_, val_, train_ = map(unordered, (test, val, train))
    assert not test_ & val_
    assert not test_ & train_
    assert not val_ & train_
    assert test_ | val_ | train_ == unordered(set(range(PAIRS)))
