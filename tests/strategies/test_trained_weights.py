"""Methods that train the weights themselves: which, and how far they have moved."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_peft.adapters import adapter_layers
from lightning_peft.strategies.trained_weights import TrainedWeights


def test_the_targets_weights_train_and_nothing_stands_beside_them(two_linears) -> None:
    model = two_linears()
    linear = model[0]
    report = TrainedWeights(target_modules=["0"]).attach(model)
    assert model[0] is linear
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {"0.weight"}
    assert report.trainable == 16
    assert not adapter_layers(model)


def test_saved_modules_train_whole_beside_them(two_linears) -> None:
    model = two_linears()
    TrainedWeights(target_modules=["0"], modules_to_save=["2"]).attach(model)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {"0.weight", "2.weight", "2.bias"}


def test_a_change_is_the_distance_from_the_start(two_linears) -> None:
    model, strategy = two_linears(), TrainedWeights()
    strategy.attach(model)
    assert {n: float(c) for n, c in strategy.weight_changes(model).items()} == {"0": 0, "2": 0}
    with torch.no_grad():
        model[2].weight.add_(torch.full((2, 4), 0.5))
    changes = strategy.weight_changes(model)
    assert changes["0"] == 0
    assert changes["2"].item() == pytest.approx(0.5 * 8**0.5)


def test_a_weight_in_a_few_levels_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    model[0].weight = nn.Parameter(torch.zeros(3, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="TrainedWeights trains the weights themselves, which a L"):
        TrainedWeights().attach(model)
