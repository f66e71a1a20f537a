"""The schedule by simulation, selection by brute force."""

from __future__ import annotations

import itertools

import pytest
import torch

from lightning_peft.pruning import (
    last_event_step,
    left_after,
    prune_due,
    rank_at,
    select_global,
    select_per_matrix,
)


@pytest.mark.parametrize(
    ("r", "target_r", "start_step", "prune_every", "prune_count"),
    [(8, 2, 0, 10, 2), (8, 3, 5, 1, 2), (32, 8, 50, 10, 2), (7, 6, 3, 4, 5), (4, 4, 2, 3, 1)],
)
def test_the_schedule_is_that_of_a_loop(r, target_r, start_step, prune_every, prune_count) -> None:
    rank, next_event, last = r, start_step, None
    for step in range(200):
        due = step == next_event
        if due:
            next_event += prune_every
            if rank > target_r:
                rank, last = max(target_r, rank - prune_count), step
        assert prune_due(step, start_step, prune_every) == due
        assert rank_at(step, r, target_r, start_step, prune_every, prune_count) == rank
    assert rank == target_r
    assert last_event_step(r, target_r, start_step, prune_every, prune_count) == last


def test_the_authors_schedule() -> None:
    schedule = {"start_step": 0, "prune_every": 10, "prune_count": 2}
    assert [s for s in range(35) if prune_due(s, 0, 10)] == [0, 10, 20, 30]
    assert [rank_at(s, 128, 64, **schedule) for s in (-1, 0, 9, 10, 309, 310, 999)] == [
        *(128, 126, 126, 124, 66, 64, 64)
    ]
    assert last_event_step(128, 64, **schedule) == 310


def test_per_matrix_takes_the_lowest_of_each_row() -> None:
    scores = torch.tensor([[3.0, 1.0, 2.0, 0.0], [0.5, 9.0, 0.25, 7.0]])
    assert select_per_matrix(scores, 2).tolist() == [[3, 1], [2, 0]]
    assert select_per_matrix(scores[0], 2).tolist() == [3, 1]
    assert select_per_matrix(scores, 0).shape == (2, 0)


def test_per_matrix_breaks_ties_by_index_and_spares_nan() -> None:
    assert select_per_matrix(torch.zeros(1, 100), 3).tolist() == [[0, 1, 2]]
    scores = torch.tensor([[torch.nan, 1.0, 1.0, torch.inf, 0.0]])
    assert select_per_matrix(scores, 4).tolist() == [[4, 1, 2, 3]]


def test_global_is_the_cheapest_choice_that_respects_the_floor() -> None:
    generator = torch.Generator().manual_seed(0)
    for trial in range(20):
        scores = [torch.rand(n, generator=generator) for n in (3, 2, 4)]
        if trial % 2:
            scores[0] *= 1e-3  # so that the floor bites
        flat = [(i, j) for i, s in enumerate(scores) for j in range(len(s))]
        for total in range(6):
            cheapest = min(
                (
                    choice
                    for choice in itertools.combinations(flat, total)
                    if all(
                        len(s) - sum(i == m for m, _ in choice) >= 1 for i, s in enumerate(scores)
                    )
                ),
                key=lambda choice: sum(scores[i][j].item() for i, j in choice),
            )
            chosen = select_global(scores, total, min_r=1)
            assert {(i, j) for i, c in enumerate(chosen) for j in c.tolist()} == set(cheapest)


def test_global_without_a_binding_floor_is_one_sort() -> None:
    scores = [torch.tensor([4.0, 1.0, 6.0]), torch.tensor([2.0, 0.0]), torch.tensor([5.0, 3.0])]
    chosen = select_global(scores, 3, min_r=0)
    assert [c.tolist() for c in chosen] == [[1], [1, 0], []]
    assert all(c.dtype == torch.int64 for c in chosen)


def test_global_floor_moves_the_removal_elsewhere_and_stops_where_no_more_is_allowed() -> None:
    scores = [torch.tensor([0.0, 0.1, 0.2]), torch.tensor([5.0, 6.0, 7.0])]
    assert [c.tolist() for c in select_global(scores, 3, min_r=2)] == [[0], [0]]
    assert [c.tolist() for c in select_global(scores, 3, min_r=1)] == [[0, 1], [0]]
    assert [c.tolist() for c in select_global(scores, 3, min_r=5)] == [[], []]
    assert [c.tolist() for c in select_global(scores, 0, min_r=1)] == [[], []]
    assert select_global([], 3, min_r=1) == []


def test_global_breaks_ties_by_matrix_then_index_and_spares_nan() -> None:
    scores = [torch.zeros(20), torch.zeros(20)]
    assert [c.tolist() for c in select_global(scores, 3, min_r=18)] == [[0, 1], [0]]
    scores = [torch.tensor([torch.nan, 2.0]), torch.tensor([3.0, torch.nan])]
    assert [c.tolist() for c in select_global(scores, 2, min_r=0)] == [[1], [0]]


def test_global_with_equal_scores_is_the_same_every_time() -> None:
    scores = [torch.randint(3, (50,)).float() for _ in range(4)]
    first = select_global(scores, 60, min_r=10)
    for _ in range(3):
        again = select_global([s.clone() for s in scores], 60, min_r=10)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_what_leaves_at_events_is_a_cubic_rounded_down() -> None:
    assert [left_after(100, 0.5, i, 4) for i in range(5)] == [100, 72, 57, 51, 50]
    assert [left_after(2, 0.5, i, 3) for i in range(4)] == [2, 2, 2, 1]
    assert [left_after(10, 0.7, 1, 1), left_after(10, 0.0, 1, 1)] == [3, 10]  # 0.7 in floats too
    for i in range(11):
        gone = 0.6 * (1 - (1 - i / 10) ** 3) * 1000
        assert left_after(1000, 0.6, i, 10) == 1000 - int(gone + 1e-6)
