"""Strategies that start at a part of the weight say which; all else is shared."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_peft.adapters import adapter_layers
from lightning_peft.adapters.residual import ResidualLinear
from lightning_peft.strategies.starts_inside import StartsInside


class FirstRows(StartsInside):
    """Takes the first r rows of each weight."""

    def factors(self, weight: Tensor, r: int, scaling: float) -> tuple[Tensor, Tensor]:
        assert weight.dtype == torch.float32
        return torch.eye(len(weight), r) / scaling, weight[:r]


@pytest.mark.parametrize("alpha", [None, 6])
def test_the_base_loses_the_part_and_the_model_stays(alpha, two_linears) -> None:
    model, x = two_linears(), torch.randn(5, 4)
    weight, expected = model[0].weight.detach().clone(), model(x)
    strategy = FirstRows(r=2, lora_alpha=alpha)
    strategy.attach(model)
    assert strategy.lora_alpha == (alpha or 2)
    layer = adapter_layers(model)["0"]
    assert type(layer) is ResidualLinear
    assert layer.base.weight[:2].abs().max() < 1e-6
    assert torch.equal(layer.base.weight[2:], weight[2:])
    assert torch.equal(layer.lora_A, weight[:2])
    torch.testing.assert_close(model(x), expected)


def test_without_a_start_the_base_is_left_alone(two_linears) -> None:
    model = two_linears()
    weight = model[0].weight.detach().clone()
    FirstRows(r=2).attach(model, initialize=False)  # what is loaded next takes its part out
    assert torch.equal(model[0].base.weight, weight)
    assert not model[0].start_A.any()


def test_on_meta_there_is_nothing_to_take() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 3))
    FirstRows(r=2).attach(model)
    assert model[0].lora_A.is_meta


def test_it_must_see_the_weights_and_say_the_part() -> None:
    assert StartsInside.needs == {"weights at attach"}
    with pytest.raises(NotImplementedError):
        StartsInside(r=2).attach(nn.Sequential(nn.Linear(4, 3)))
