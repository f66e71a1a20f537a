"""The rank that meets a budget of parameters."""

from __future__ import annotations

import pytest

from lightning_peft.comparison.budget import find_rank
from lightning_peft.comparison.schema import Match


@pytest.mark.parametrize("target", [100, 130, 1000, 999_950])
def test_nearest_rank_is_that_of_a_scan(target: int) -> None:
    def count(rank: int) -> int:
        return 60 + 37 * rank

    rank, found = find_rank("a", Match(parameters=target, tolerance=0.5), count)
    best = min(range(1, 40_000), key=lambda r: abs(count(r) - target))
    assert (rank, found) == (best, count(best))


@pytest.mark.parametrize("target", [100, 5_559, 155_648, 10**7])
def test_few_counts_find_a_rank_also_where_they_rise_with_the_square(target: int) -> None:
    for count in (lambda rank: 60 + 37 * rank, lambda rank: 28 * rank * rank):
        asked: list[int] = []
        rank, _ = find_rank(
            "a",
            Match(parameters=target, tolerance=1.0),
            lambda rank, asked=asked, count=count: asked.append(rank) or count(rank),
        )
        error = abs(count(rank) - target)
        assert error <= min(abs(count(max(rank + step, 1)) - target) for step in (-1, 1))
        assert len(asked) <= 16
        assert len(set(asked)) == len(asked)


def test_a_budget_below_rank_one_names_that_rank_alone_and_the_next() -> None:
    with pytest.raises(ValueError, match=r"r = 1 has 1,000") as caught:
        find_rank("a", Match(parameters=10), lambda rank: 1000 * rank)
    assert "match.leave" in str(caught.value)


def test_a_count_that_no_rank_moves_is_refused_without_a_search() -> None:
    asked: list[int] = []

    def count(rank: int) -> int:
        asked.append(rank)
        return 500

    with pytest.raises(ValueError, match=r"model.adapter.r = 1 has 500\."):
        find_rank("a", Match(parameters=1000), count)
    assert asked == [1, 2]


def test_ranks_that_a_method_refuses_end_the_search_at_the_largest_it_takes() -> None:
    def count(rank: int) -> int:
        if rank > 11:
            raise ValueError("target_r must lie between 0 and r = 11")
        return 10 * rank

    assert find_rank("a", Match(parameters=112), count) == (11, 110)
    assert find_rank("a", Match(parameters=90), count) == (9, 90)
    with pytest.raises(ValueError, match="r = 10 has 100 and model.adapter.r = 11 has 110"):
        find_rank("a", Match(parameters=300), count)


@pytest.mark.parametrize("least", [2, 3, 5, 8, 600])
def test_ranks_that_a_method_refuses_begin_the_search_at_the_smallest_it_takes(least: int) -> None:
    def count(rank: int) -> int:
        if rank < least:
            raise ValueError(f"target_r must be at least r = {least}, got {rank}")
        return 10 * rank

    for rank in (least, least + 1, 3 * least):
        assert find_rank("a", Match(parameters=10 * rank), count) == (rank, 10 * rank)
    with pytest.raises(ValueError, match=rf"model.adapter.r = {least} has {10 * least:,}\b"):
        find_rank("a", Match(parameters=5), count)


def test_a_method_that_takes_no_rank_says_why() -> None:
    def count(rank: int) -> int:
        raise ValueError(f"min_r must lie between 0 and 1, got {rank}")

    with pytest.raises(ValueError, match="got 1$"):
        find_rank("a", Match(parameters=5), count)
