"""LoRA-drop's importance against direct computation and brute force."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from lightning_peft.pruning import layers_to_keep, shares, shares_by_kind


def test_shares_are_fractions_of_the_sum() -> None:
    assert shares([1.0, 3.0, 4.0]) == [0.125, 0.375, 0.5]
    assert shares([0.0, 0.0]) == [0.0, 0.0]
    assert shares([]) == []
    assert shares([1e308, 1e308]) == [0.5, 0.5]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0])
def test_importance_that_cannot_be_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match=r"importance\[1\]"):
        shares([1.0, bad])


def test_each_kind_has_its_own_distribution() -> None:
    importance = {"0.q": 1.0, "0.v": 30.0, "1.q": 3.0, "1.v": 10.0, "head": 0.0}
    share = shares_by_kind(importance, lambda name: name.split(".")[-1])
    assert share == {"0.q": 0.25, "0.v": 0.75, "1.q": 0.75, "1.v": 0.25, "head": 0.0}
    assert list(share) == list(importance)


@pytest.mark.parametrize("threshold", [0.05, 0.3, 0.5, 0.9, 0.99, 1.0])
def test_the_kept_layers_are_the_fewest_that_reach_the_threshold(threshold: float) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        importance = torch.rand(6, generator=generator).double().exp().pow(4).tolist()
        kept = layers_to_keep(importance, threshold)
        total = sum(importance)
        enough = [
            choice
            for size in range(7)
            for choice in itertools.combinations(range(6), size)
            if sum(importance[i] for i in choice) / total >= threshold - 1e-9
        ]
        fewest = min(len(choice) for choice in enough)
        best = max(
            (choice for choice in enough if len(choice) == fewest),
            key=lambda choice: sum(importance[i] for i in choice),
        )
        assert set(kept) == set(best)
        assert kept == sorted(kept, key=lambda i: -importance[i])


def test_the_threshold_is_reached_in_spite_of_rounding() -> None:
    assert layers_to_keep([0.1] * 10, 0.9) == list(range(9))
    assert layers_to_keep([0.1] * 10, 0.3) == [0, 1, 2]
    assert layers_to_keep([7.0, 2.0, 1.0], 0.9) == [0, 1]
    assert layers_to_keep([1.0, 2.0, 7.0], 0.9) == [2, 1]


def test_the_threshold_one_keeps_all_that_matter_and_zero_importance_keeps_all() -> None:
    assert layers_to_keep([0.2, 0.0, 0.5, 0.3], 1.0) == [2, 3, 0]
    assert layers_to_keep([0.0, 0.0, 0.0], 0.9) == [0, 1, 2]
    assert layers_to_keep([], 0.9) == []


def test_ties_keep_the_lower_layer_whatever_the_scale() -> None:
    assert layers_to_keep([1.0, 1.0, 1.0, 1.0], 0.5) == [0, 1]
    assert layers_to_keep([1e-300, 1e-300, 2e-300], 0.75) == [2, 0]


@pytest.mark.parametrize("threshold", [0.0, -0.1, 1.1, math.nan])
def test_a_threshold_outside_its_range_is_refused(threshold: float) -> None:
    with pytest.raises(ValueError, match="threshold="):
        layers_to_keep([1.0], threshold)
