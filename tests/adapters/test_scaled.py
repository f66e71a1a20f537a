"""The layer with trained scales against its formula."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_peft.adapters.gates import RankScale
from lightning_peft.adapters.scaled import ScaledLinear


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-5), (torch.bfloat16, 0.03), (torch.float64, 1e-12)],
)
def test_trained_scales_are_their_formula(p, dtype, tolerance, run_layer, assert_same) -> None:
    torch.manual_seed(0)
    base = nn.Linear(20, 12, dtype=dtype).requires_grad_(False)
    layer = ScaledLinear(base, 6, 9, p, gate=RankScale(6, 0.7), start=0.3)
    layer.reset_parameters(False)
    layer.train()

    def formula(x: Tensor) -> Tensor:
        z = layer.gate(layer.dropout(x.to(layer.lora_A.dtype)) @ layer.lora_A.T)
        change = z @ layer.lora_B.T * layer.output_scale * layer.scaling
        return base(x) + change.to(dtype)

    x = torch.randn(2, 40, 20, dtype=dtype)
    assert_same(run_layer(layer, layer, x), run_layer(layer, formula, x), tolerance)
