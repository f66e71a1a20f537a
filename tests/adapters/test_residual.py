"""A layer that starts at a part of its base: what the base loses, and gets back."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_peft.adapters.residual import ResidualLinear

SCALING = 3.0


def started(seed: int, base: nn.Linear) -> ResidualLinear:
    layer = ResidualLinear(base.requires_grad_(False), 2, 2 * SCALING)
    generator = torch.Generator().manual_seed(seed)
    layer.start_at(torch.randn(4, 2, generator=generator), torch.randn(2, 5, generator=generator))
    return layer


@pytest.fixture
def base() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(5, 4)


def test_the_base_loses_what_the_adapter_starts_at(base) -> None:
    weight, x = base.weight.detach().clone(), torch.randn(6, 5)
    expected = base(x)
    layer = started(1, base)
    part = SCALING * layer.lora_B @ layer.lora_A
    torch.testing.assert_close(base.weight.detach(), weight - part.detach())
    torch.testing.assert_close(layer(x), expected)
    assert layer.delta_weight().abs().max() < 1e-5


def test_the_change_is_told_against_the_original_weight(base) -> None:
    weight, layer = base.weight.detach().clone(), started(1, base)
    with torch.no_grad():
        layer.lora_B.mul_(1.5)
    change = (SCALING * 0.5 * layer.start_B @ layer.start_A).detach()
    left, right = layer.factors()
    assert (left.shape, right.shape) == ((4, 4), (4, 5))
    torch.testing.assert_close(layer.delta_weight(), change, rtol=1e-4, atol=1e-5)
    merged = layer.merged_weight(base.weight.detach())
    torch.testing.assert_close(merged, weight + change, rtol=1e-4, atol=1e-5)


def test_what_is_saved_takes_the_same_part_out_of_a_fresh_base_bit_for_bit(base) -> None:
    fresh = nn.Linear(5, 4)
    fresh.load_state_dict(base.state_dict())
    layer = started(1, base)
    own = {k: v for k, v in layer.state_dict().items() if not k.startswith("base.")}
    other = ResidualLinear(fresh.requires_grad_(False), 2, 2 * SCALING)
    for _ in range(2):  # loading once more changes nothing
        other.load_state_dict(own, strict=False)
        assert torch.equal(other.base.weight, layer.base.weight)
        assert torch.equal(other.lora_A, layer.lora_A)


def test_other_factors_give_the_base_its_own_part_back_first(base) -> None:
    weight = base.weight.detach().clone()
    twin = nn.Linear(5, 4)
    twin.load_state_dict(base.state_dict())
    layer, other = started(1, base), started(2, twin)
    own = {k: v for k, v in other.state_dict().items() if not k.startswith("base.")}
    layer.load_state_dict(own, strict=False)
    part = SCALING * layer.start_B @ layer.start_A
    assert torch.equal(layer.start_A, other.start_A)
    torch.testing.assert_close(layer.base.weight.detach(), weight - part)


def test_a_quantized_base_is_refused() -> None:
    base = nn.Linear(5, 4)
    base.weight = nn.Parameter(torch.zeros(4, 5, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="a Linear cannot lose a part of its weight without round"):
        ResidualLinear(base, 2, 2)
