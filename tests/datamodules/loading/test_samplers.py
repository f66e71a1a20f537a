from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lightning_peft.datamodules.loading.samplers import (
    RandomBatchSampler,
    fixed_sample,
    stratified_sample,
)


@pytest.mark.parametrize("kind", ["random", "grouped"])
class TestSamplers:
    def test_every_row_occurs_once_in_each_epoch(self, kind: str, sampler: Any) -> None:
        for epoch in range(3):
            batches = sampler(kind)
            batches.epoch = epoch
            drawn = list(batches)
            assert len(drawn) == len(batches) == 20
            assert sorted(sum(drawn, [])) == list(range(157))

    def test_order_is_a_function_of_seed_and_epoch(self, kind: str, sampler: Any) -> None:
        orders = {}
        for seed in (0, 1):
            for epoch in (0, 1):
                first, second = sampler(kind, seed=seed), sampler(kind, seed=seed)
                first.epoch = second.epoch = epoch
                assert list(first) == list(second)
                orders[seed, epoch] = str(list(first))
        assert len(set(orders.values())) == 4

    def test_start_leaves_out_the_first_batches(self, kind: str, sampler: Any) -> None:
        whole, rest = sampler(kind), sampler(kind)
        rest.start = 7
        assert list(rest) == list(whole)[7:]
        assert len(rest) == 20

    def test_ranks_share_the_batches_out(self, kind: str, sampler: Any) -> None:
        alone = list(sampler(kind))
        shares = [list(sampler(kind, process=r, processes=3)) for r in range(3)]
        assert [len(s) for s in shares] == [6, 6, 6]
        assert [b for step in zip(*shares, strict=True) for b in step] == alone[:18]


def test_grouped_batches_hold_rows_of_like_length(lengths: Any, sampler: Any) -> None:
    def padding(batches: RandomBatchSampler) -> int:
        return sum(int((lengths[b].max() - lengths[b]).sum()) for b in batches)

    assert padding(sampler("grouped")) < padding(sampler()) / 5
    longest = [int(lengths[b].max()) for b in sampler("grouped")]
    assert longest[0] == max(lengths)
    assert longest != sorted(longest, reverse=True)


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
