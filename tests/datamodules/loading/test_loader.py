from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from lightning_peft.datamodules.loading.batches import Subset, training_batch
from lightning_peft.datamodules.loading.loader import ResumableDataLoader, eval_loader
from lightning_peft.datamodules.loading.samplers import (
    LengthGroupedBatchSampler,
    RandomBatchSampler,
    fixed_sample,
    stratified_sample,
)

LENGTHS = np.random.default_rng(3).integers(4, 90, size=157)


class Rows:
    """Row i has LENGTHS[i] tokens, the first of them i; the last i % 3 + 1 carry labels."""

    def __len__(self) -> int:
        return len(LENGTHS)

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[list[int], list[int]]]:
        ends = [(i, int(LENGTHS[i])) for i in map(int, indices)]
        return [([i] * end, [end - i % 3 - 1, end]) for i, end in ends]

    def collate(self, rows: Any) -> dict[str, Any]:
        return training_batch(rows, 0)

    def count_targets(self, indices: Sequence[int]) -> int:
        return sum(int(i) % 3 + 1 for i in indices)

    def lengths(self) -> np.ndarray:
        return LENGTHS

    def strata(self) -> np.ndarray:
        return np.arange(len(LENGTHS)) % 5


def sampler(kind: str = "random", **kwargs: Any) -> RandomBatchSampler:
    if kind == "grouped":
        return LengthGroupedBatchSampler(LENGTHS, 8, **kwargs)
    return RandomBatchSampler(len(LENGTHS), 8, **kwargs)


def rows_of(batch: dict[str, Any]) -> list[int]:
    return batch["input_ids"][:, 0].tolist()


def targets_of(batch: dict[str, Any]) -> int:
    return int((batch["labels"][:, 1:] != -100).sum())


@pytest.mark.parametrize("kind", ["random", "grouped"])
class TestSamplers:
    def test_every_row_occurs_once_in_each_epoch(self, kind: str) -> None:
        for epoch in range(3):
            batches = sampler(kind)
            batches.epoch = epoch
            drawn = list(batches)
            assert len(drawn) == len(batches) == 20
            assert sorted(sum(drawn, [])) == list(range(157))

    def test_order_is_a_function_of_seed_and_epoch(self, kind: str) -> None:
        orders = {}
        for seed in (0, 1):
            for epoch in (0, 1):
                first, second = sampler(kind, seed=seed), sampler(kind, seed=seed)
                first.epoch = second.epoch = epoch
                assert list(first) == list(second)
                orders[seed, epoch] = str(list(first))
        assert len(set(orders.values())) == 4

    def test_start_leaves_out_the_first_batches(self, kind: str) -> None:
        whole, rest = sampler(kind), sampler(kind)
        rest.start = 7
        assert list(rest) == list(whole)[7:]
        assert len(rest) == 20

    def test_ranks_share_the_batches_out(self, kind: str) -> None:
        alone = list(sampler(kind))
        shares = [list(sampler(kind, rank=r, world_size=3)) for r in range(3)]
        assert [len(s) for s in shares] == [6, 6, 6]
        assert [b for step in zip(*shares, strict=True) for b in step] == alone[:18]


def test_grouped_batches_hold_rows_of_like_length() -> None:
    def padding(batches: RandomBatchSampler) -> int:
        return sum(int((LENGTHS[b].max() - LENGTHS[b]).sum()) for b in batches)

    assert padding(sampler("grouped")) < padding(sampler()) / 5
    lengths = [int(LENGTHS[b].max()) for b in sampler("grouped")]
    assert lengths[0] == max(LENGTHS)
    assert lengths != sorted(lengths, reverse=True)


@pytest.mark.parametrize("kind", ["random", "grouped"])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("accumulate", "limit"), [(1, None), (3, None), (3, 10), (40, None)])
def test_windows_hold_their_target_tokens(
    kind: str, workers: int, accumulate: int, limit: int | None
) -> None:
    if workers and (accumulate, limit) != (3, None):
        pytest.skip("worker processes are slow to start, and one case shows them")
    loader = ResumableDataLoader(Rows(), sampler(kind), accumulate, limit, num_workers=workers)
    batches = list(loader)[:limit]
    for start in range(0, len(batches), accumulate):
        window = batches[start : start + accumulate]
        tokens = sum(map(targets_of, window))
        assert [b["num_target_tokens"].item() for b in window] == [tokens] * len(window)
    assert batches[0]["num_target_tokens"].shape == ()


def test_windows_hold_the_target_tokens_of_all_processes() -> None:
    loaders = [
        list(ResumableDataLoader(Rows(), sampler(rank=r, world_size=2), 4)) for r in range(2)
    ]
    for start in range(0, 10, 4):
        window = [b for loader in loaders for b in loader[start : start + 4]]
        assert {b["num_target_tokens"].item() for b in window} == {sum(map(targets_of, window))}


def test_accumulation_may_change_between_windows() -> None:
    sizes = [2]
    loader = ResumableDataLoader(Rows(), sampler(), lambda: sizes[0])
    batches = []
    for i, batch in enumerate(loader):
        batches.append(batch)
        if i == 3:
            sizes[0] = 4
    tokens = [targets_of(b) for b in batches]
    told = [b["num_target_tokens"].item() for b in batches]
    assert told[2:8] == [sum(tokens[2:4])] * 2 + [sum(tokens[4:8])] * 4


@pytest.mark.parametrize("kind", ["random", "grouped"])
@pytest.mark.parametrize("limit", [None, 11])
def test_a_loaded_state_continues_the_same_sequence(kind: str, limit: int | None) -> None:
    def run(
        loader: ResumableDataLoader, epochs: int
    ) -> list[tuple[dict[str, int], list[int], int]]:
        seen = []
        for _ in range(epochs):
            for i, batch in enumerate(loader):
                seen.append((loader.state_dict(), rows_of(batch), int(batch["num_target_tokens"])))
                if limit and loader.position >= limit:
                    break
                assert i < 20
        return seen

    whole = run(ResumableDataLoader(Rows(), sampler(kind), 2, limit), 3)
    assert len(whole) == 3 * (limit or 20)
    for done in (*range(1, 50, 4), 10, 11, 20, 22, 40):
        if done >= len(whole):
            continue
        loader = ResumableDataLoader(Rows(), sampler(kind), 2, limit)
        loader.load_state_dict(whole[done - 1][0])
        rest = run(loader, 3)[: len(whole) - done]
        assert [r[:2] for r in rest] == [w[:2] for w in whole[done:]]
        # A window's first steps are gone if it was left in its middle, so their tokens are too.
        alike = [r[2] == w[2] for r, w in zip(rest, whole[done:], strict=True)]
        assert all(alike[1:])
        position = whole[done - 1][0]["position"]
        assert alike[0] or position % 2


def test_iterating_again_without_a_batch_stays_in_the_epoch() -> None:
    loader = ResumableDataLoader(Rows(), sampler())
    iter(loader)
    first = rows_of(next(iter(loader)))
    assert loader.state_dict() == {"epoch": 0, "position": 1}
    iter(loader)
    assert loader.state_dict() == {"epoch": 1, "position": 0}
    loader.load_state_dict({"epoch": 0, "position": 0})
    iter(loader)
    assert rows_of(next(iter(loader))) == first
    assert len(loader) == 20


def test_same_every_epoch_repeats_the_first_order() -> None:
    loader = ResumableDataLoader(Rows(), sampler(), same_every_epoch=True)
    assert [rows_of(b) for b in loader] == [rows_of(b) for b in loader]


@pytest.mark.parametrize("workers", [0, 2])
def test_loading_leaves_the_global_random_stream_alone(workers: int) -> None:
    before = torch.get_rng_state()
    for batch in ResumableDataLoader(Rows(), sampler(), num_workers=workers):
        assert "labels" in batch
    assert len(list(eval_loader(Rows(), range(157), 8, num_workers=workers))) == 20
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("rows", "world"), [(10, 1), (10, 3), (1, 4)])
def test_eval_rows_are_shared_out_evenly(rows: int, world: int) -> None:
    shares = [
        [i for b in eval_loader(Rows(), range(rows), 2, r, world) for i in rows_of(b)]
        for r in range(world)
    ]
    assert len({len(s) for s in shares}) == 1
    assert set(sum(shares, [])) == set(range(rows))
    assert sum(map(len, shares)) < rows + world


def test_stratified_sample_draws_the_same_share_of_each() -> None:
    strata = np.array([0] * 100 + [1] * 40 + [2] * 3)
    drawn = stratified_sample(strata, 0.1, seed=1)
    assert np.bincount(strata[drawn]).tolist() == [10, 4, 1]
    assert sorted(set(drawn.tolist())) == drawn.tolist()
    assert stratified_sample(strata, 0.1, seed=1).tolist() == drawn.tolist()
    assert stratified_sample(strata, 0.1, seed=2).tolist() != drawn.tolist()
    assert stratified_sample(strata, 1.0).tolist() == list(range(143))
    with pytest.raises(ValueError, match=r"ratio is 0; it has to lie in \(0, 1\]"):
        stratified_sample(strata, 0)


def test_fixed_sample_is_fixed_and_ascending() -> None:
    assert fixed_sample(5, None) == fixed_sample(5, 9) == [0, 1, 2, 3, 4]
    assert fixed_sample(5, 0) == []
    drawn = fixed_sample(1000, 10)
    assert drawn == sorted(set(drawn)) == fixed_sample(1000, 10)
    assert len(drawn) == 10


def test_a_subset_is_its_rows() -> None:
    subset = Subset(Rows(), [5, 3, 100])
    assert len(subset) == 3
    assert rows_of(subset.collate(subset.__getitems__([2, 0]))) == [100, 5]
    assert subset.count_targets([0, 1]) == 3 + 1
    assert subset.lengths() is not None
    assert subset.lengths().tolist() == LENGTHS[[5, 3, 100]].tolist()  # type: ignore[union-attr]
    assert subset.strata().tolist() == [0, 3, 0]
