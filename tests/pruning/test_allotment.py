"""Allotments of a budget: exact sums, bounds, order, and the rules of the papers."""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lightning_peft.errors import UserError
from lightning_peft.pruning.allotment import allot, allot_by_cost, allot_highest, even_ranks

IMPORTANCE = st.lists(
    st.one_of(st.just(0.0), st.floats(0, 1e300), st.sampled_from([1.0, 2.0, 5e-324])),
    min_size=1,
    max_size=12,
)


@st.composite
def budgets(draw):
    importance = draw(IMPORTANCE)
    min_r = draw(st.integers(0, 5))
    max_r = draw(st.integers(max(min_r, 1), 40))
    n = len(importance)
    return importance, draw(st.integers(n * min_r, n * max_r)), min_r, max_r


@settings(max_examples=300, deadline=None)
@given(budgets())
def test_ranks_sum_to_the_budget_within_bounds_and_in_order(given_) -> None:
    importance, budget, min_r, max_r = given_
    ranks = allot(importance, budget, min_r, max_r)
    assert sum(ranks) == budget
    assert all(min_r <= rank <= max_r for rank in ranks)
    for one, rank in zip(importance, ranks, strict=True):
        for other, its_rank in zip(importance, ranks, strict=True):
            assert one <= other or rank >= its_rank
    # Equal layers differ by one component at most, which the earlier one has.
    for i, value in enumerate(importance):
        for j in range(i + 1, len(importance)):
            if importance[j] == value:
                assert 0 <= ranks[i] - ranks[j] <= 1
    assert allot(importance, budget, min_r, max_r) == ranks


@settings(max_examples=200, deadline=None)
@given(budgets(), st.integers(-30, 30))
def test_only_ratios_of_importance_matter(given_, power) -> None:
    importance, budget, min_r, max_r = given_
    scaled = [value * 2.0**power for value in importance]
    assume(
        all(
            math.isfinite(v) and v * 2.0**-power == w
            for v, w in zip(scaled, importance, strict=True)
        )
    )
    assert allot(scaled, budget, min_r, max_r) == allot(importance, budget, min_r, max_r)


@settings(max_examples=200, deadline=None)
@given(budgets())
def test_unrounded_shares_are_proportional_where_no_bound_holds(given_) -> None:
    importance, budget, min_r, max_r = given_
    ranks = allot(importance, budget, min_r, max_r)
    inside = [
        (value, rank)
        for value, rank in zip(importance, ranks, strict=True)
        if min_r + 1 < rank < max_r - 1 and value > 0
    ]
    for value, rank in inside:
        for other, its_rank in inside:
            # λ lies in (rank - 1, rank + 1) / importance for both.
            assert (rank - 1) * (other / value) <= (its_rank + 1) * (1 + 1e-9)


@pytest.mark.parametrize(
    ("importance", "budget", "min_r", "max_r", "expected"),
    [
        ([3, 1, 1], 10, 1, 8, [6, 2, 2]),
        ([3, 1, 1], 12, 1, 8, [7, 3, 2]),  # 7.2, 2.4, 2.4: the equal remainder's earlier layer
        ([100, 1, 1], 12, 1, 8, [8, 2, 2]),  # the ceiling's rest is shared again
        ([100, 2, 1], 12, 1, 8, [8, 3, 1]),  # 2.67 and 1.33
        ([100, 0, 0], 12, 1, 8, [8, 2, 2]),
        ([0, 0, 0], 7, 1, 8, [3, 2, 2]),
        ([8, 1, 1], 10, 2, 8, [6, 2, 2]),  # the floor is paid by who has more
    ],
)
def test_known_allotments(importance, budget, min_r, max_r, expected) -> None:
    assert allot(importance, budget, min_r, max_r) == expected


@pytest.mark.parametrize(
    ("importance", "budget", "sentence"),
    [
        (
            [1.0, 2.0],
            3,
            "budget must lie between 4 (min_r = 2 in each of 2 layers) and 8 (the most that they "
            "may have), got 3.",
        ),
        (
            [1.0, 2.0],
            9,
            "budget must lie between 4 (min_r = 2 in each of 2 layers) and 8 (the most that they "
            "may have), got 9.",
        ),
        (
            [1.0, math.nan],
            6,
            "importance[1] is nan, and must be finite and at least 0; the loss of the sample has "
            "probably no finite gradient.",
        ),
        (
            [-1.0, 1.0],
            6,
            "importance[0] is -1.0, and must be finite and at least 0; the loss of the sample has "
            "probably no finite gradient.",
        ),
    ],
)
def test_what_cannot_be_allotted_is_refused(importance, budget, sentence) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(sentence)}$"):
        allot(importance, budget, min_r=2, max_r=4)


def test_costs_are_paid_out_of_the_share_and_rounded_down() -> None:
    # Shares 0.5, 0.3, 0.2 of 100.4: 50, 30, 20 for components of 8, 4 and 40.
    assert allot_by_cost([5, 3, 2], [8, 4, 40], 100.4, 1, 7) == [6, 7, 1]
    assert allot_by_cost([5, 3, 2], [8, 4, 40], 100.4, 0, 9) == [6, 7, 0]
    assert allot_by_cost([0, 0], [2, 2], 12, 1, 9) == [3, 3]


@pytest.mark.parametrize(
    ("budget", "min_r", "expected"), [(4, 0, [3, 0, 1]), (4, 1, [2, 1, 1]), (5, 1, [3, 1, 1])]
)
def test_the_highest_components_of_all_layers_are_counted(budget, min_r, expected) -> None:
    values = [[0.9, 0.5, 0.4], [0.1, 0.05], [0.6, 0.3]]
    assert allot_highest(values, budget, min_r) == expected


def test_ties_between_components_go_to_the_earlier_layer() -> None:
    assert allot_highest([[0.5, 0.2], [0.5, 0.2], [0.5, 0.2]], 4) == [2, 1, 1]


def test_more_components_than_there_are_are_refused() -> None:
    with pytest.raises(UserError, match=r"^budget must lie between 0 \(min_r = 0 in each of 2 lay"):
        allot_highest([[1.0], [0.5]], 3)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=9), st.integers(0, 60))
def test_even_ranks_sum_to_the_budget_and_no_two_could_be_more_alike(bounds, budget) -> None:
    least, most = [min(pair) for pair in bounds], [max(pair) for pair in bounds]
    ranks = even_ranks(most, budget, least)
    assert all(a <= rank <= b for a, rank, b in zip(least, ranks, most, strict=True))
    assert sum(ranks) == min(max(budget, sum(least)), sum(most))
    for i, rank in enumerate(ranks):
        for j, other in enumerate(ranks):
            assert rank <= other + 1 or rank == least[i] or other == most[j]
    assert even_ranks(most, budget) == even_ranks(most, budget, [0] * len(most))
