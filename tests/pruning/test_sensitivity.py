"""AdaLoRA's budget and importance against the paper's formulas, written out."""

from __future__ import annotations

import pytest
import torch

from lightning_peft.pruning.sensitivity import above_budget, cubic_budget, smooth, triplet_score

RUN = {"start": 120, "target": 40, "tinit": 10, "tfinal": 20, "total_step": 110}


@pytest.mark.parametrize(
    ("step", "budget"),
    # Of 80 steps of removal a half leaves an eighth of 80 components, a quarter 27/64 of them.
    [(0, 120), (10, 120), (30, 40 + 33), (50, 40 + 10), (90, 40), (109, 40), (500, 40)],
)
def test_the_budget_falls_by_the_cube_of_what_is_left(step: int, budget: int) -> None:
    assert cubic_budget(step, **RUN) == budget


def test_the_budget_never_rises() -> None:
    budgets = [cubic_budget(step, **RUN) for step in range(120)]
    assert budgets == sorted(budgets, reverse=True)


def test_sensitivity_and_its_uncertainty_are_moving_averages() -> None:
    steps = torch.tensor([[1.0, 4.0], [3.0, 0.0]])
    average, uncertainty = torch.zeros(2), torch.zeros(2)
    for sensitivity in steps:
        average, uncertainty = smooth(sensitivity, average, uncertainty, 0.75, 0.5)
    # First step: a quarter of 1 and 4; half of what these are off by. Then once more.
    assert average.tolist() == [0.75 * 0.25 + 0.25 * 3.0, 0.75 * 1.0]
    first = [0.5 * 0.75, 0.5 * 3.0]
    assert uncertainty.tolist() == [0.5 * first[0] + 0.5 * 2.0625, 0.5 * first[1] + 0.5 * 0.75]


def test_a_triplet_is_worth_its_value_and_the_means_of_its_vectors() -> None:
    value = torch.tensor([1.0, 2.0])
    left = torch.tensor([[3.0, 0.0], [5.0, 1.0], [1.0, 2.0]])  # (d_out, r)
    right = torch.tensor([[1.0, 3.0], [0.0, 4.0]])  # (r, d_in)
    assert triplet_score(value, left, right).tolist() == [1 + 3 + 2, 2 + 1 + 2]


def test_the_highest_scores_over_all_matrices_stay() -> None:
    scores = [torch.tensor([5.0, 1.0]), torch.tensor([4.0, 2.0, 3.0])]
    kept = [mask.tolist() for mask in above_budget(scores, 3)]
    assert kept == [[True, False], [True, False, True]]
    assert [mask.tolist() for mask in above_budget(scores, 5)] == [[True] * 2, [True] * 3]


def test_ties_with_the_first_that_does_not_fit_leave_too() -> None:
    (kept,) = above_budget([torch.tensor([3.0, 2.0, 2.0, 1.0])], 2)
    assert kept.tolist() == [True, False, False, False]
