"""MiLoRA: the adapter takes the least of each weight, the base keeps the rest."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_peft.strategies import MiLoRA, RankDropout
from lightning_peft.testing import check_strategy


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_the_base_keeps_the_best_approximation_of_the_remaining_rank(shape) -> None:
    torch.manual_seed(0)
    base = nn.Linear(*shape)
    weight = base.weight.detach().clone()
    strategy = MiLoRA(r=3)
    layer = strategy.layer(base, "q")
    strategy.initialize(layer)
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    kept = left[:, :-3] * values[:-3] @ right[:-3]
    torch.testing.assert_close(layer.base.weight.detach(), kept, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close((layer.lora_B @ layer.lora_A).detach(), weight - kept)
    assert layer.delta_weight().abs().max() < 1e-6


@pytest.mark.parametrize("arguments", [{}, {"rank_gate": lambda r: RankDropout(r, 0.3)}])
def test_keeps_a_strategys_promises(arguments) -> None:
    check_strategy(MiLoRA(r=4, **arguments))
