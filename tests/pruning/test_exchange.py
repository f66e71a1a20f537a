"""Which matrices get components, against brute force over all choices."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from lightning_peft.pruning.exchange import change_sensitivity, exchanged, falling_count, grown


def test_the_sensitivity_of_a_change_by_loops() -> None:
    change, gradient = torch.randn(3, 4), torch.randn(3, 4)
    expected = sum(abs(float(change[i, j] * gradient[i, j])) for i in range(3) for j in range(4))
    found = change_sensitivity(change, gradient)
    torch.testing.assert_close(found, torch.tensor(expected / 12**0.5))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"top_h": 2, "count": 1, "max_r": 9, "left": 9}, [0, 1, 1, 0]),
        ({"top_h": 2, "count": 3, "max_r": 9, "left": 4}, [0, 1, 3, 0]),
        ({"top_h": 2, "count": 3, "max_r": 3, "left": 9}, [1, 2, 0, 0]),  # the third is full
        ({"top_h": 9, "count": 1, "max_r": 9, "left": 9}, [1, 1, 1, 1]),
        ({"top_h": 1, "count": 1, "max_r": 3, "left": 1}, [0, 1, 0, 0]),
        ({"top_h": 2, "count": 1, "max_r": 9, "left": 1}, [0, 0, 1, 0]),
    ],
)
def test_the_most_important_matrices_grow(arguments: Any, expected: list[int]) -> None:
    assert grown([1.0, 2.0, 3.0, 0.5], [2, 1, 3, 1], **arguments) == expected


def test_the_first_of_equal_matrices_grow() -> None:
    assert grown([1.0] * 4, [1] * 4, top_h=2, count=1, max_r=2, left=9) == [1, 1, 0, 0]


@pytest.mark.parametrize(
    ("step", "count"), [(0, 8), (10, 8), (15, 8), (20, 7), (25, 5), (29, 1), (30, 0), (99, 0)]
)
def test_the_number_falls_with_the_cube_of_the_time(step: int, count: int) -> None:
    assert falling_count(step, 8, init_warmup=10, final_warmup=70, total_step=100) == count


def brute_force(scores: list[list[float]], count: int, k: int) -> tuple[set[Any], list[int]]:
    """Of all sets of so many that may leave that of the least sum, and of those to grow the most.

    A matrix may lose k, not its last one; it grows for those of its k least that may leave.
    """
    lowest = [sorted(range(len(s)), key=s.__getitem__)[: min(k, len(s) - 1)] for s in scores]
    entries = [(m, i) for m, own in enumerate(lowest) for i in own]
    sets = list(itertools.combinations(entries, count))
    weight = lambda chosen: sum(scores[m][i] for m, i in chosen)  # noqa: E731
    most = max(sets, key=weight)
    return set(min(sets, key=weight)), [sum(m == n for n, _ in most) for m in range(len(scores))]


@pytest.mark.parametrize("seed", range(20))
def test_exchange_is_what_brute_force_finds(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    ranks = torch.randint(1, 5, (4,), generator=generator).tolist()
    scores = [torch.rand(rank, generator=generator) for rank in ranks]
    k = seed % 3 + 1
    offered = sum(min(k, rank - 1) for rank in ranks)
    count = min(offered, seed % 4 + 1)
    removed, added = exchanged(scores, count, k, max_r=99)
    expected, gets = brute_force([s.tolist() for s in scores], count, k)
    assert {(m, i) for m, own in enumerate(removed) for i in own} == expected
    assert added == gets
    assert exchanged(scores, 99, k, max_r=99) == exchanged(scores, offered, k, max_r=99)


def test_a_full_matrix_gets_none_and_no_more_leave_than_find_a_place() -> None:
    scores = [torch.tensor([5.0, 6.0]), torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])]
    assert exchanged(scores, 1, 1, max_r=2) == ([[], [0], []], [0, 1, 0])
    assert exchanged(scores, 1, 1, max_r=3) == ([[], [0], []], [1, 0, 0])
    assert exchanged(scores, 2, 1, max_r=2) == ([[], [0], [0]], [0, 1, 1])
    assert exchanged([torch.ones(1), torch.ones(1)], 2, 2, max_r=9) == ([[], []], [0, 0])


def test_of_equal_components_those_of_the_first_matrices_leave_and_grow() -> None:
    scores = [torch.ones(3), torch.ones(3), torch.ones(3)]
    assert exchanged(scores, 1, 1, max_r=9) == ([[0], [], []], [1, 0, 0])
