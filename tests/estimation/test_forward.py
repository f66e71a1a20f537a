"""The forward pass without values."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from lightning_peft.estimation.activations import saved_bytes
from lightning_peft.estimation.forward import FlashOnMeta, forward
from lightning_peft.modules import CausalLMModule
from lightning_peft.modules.meta import meta_base
from lightning_peft.strategies import LoRA


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_attention_has_its_shape_and_keeps_no_weights(kv_heads: int) -> None:
    tokens = 64
    with torch.device("meta"):
        query = torch.zeros(2, 4, tokens, 8, requires_grad=True)
        key, value = (torch.zeros(2, kv_heads, tokens, 8, requires_grad=True) for _ in range(2))
        mask = torch.ones(2, 1, tokens, tokens, dtype=torch.bool)
    with FlashOnMeta(), saved_bytes(torch.nn.Module()) as saved:
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
        weights = 2 * 4 * tokens * tokens * 4
        assert weights not in saved.values()
    assert out.shape == (2, 4, tokens, 8)
    assert out.is_meta


@pytest.mark.parametrize("targets", [24, 5])
def test_only_targets_go_through_the_output_layer(
    targets: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = CausalLMModule("tiny_llama", adapter=LoRA(4))
    model = module.model = meta_base(module)
    module.adapter.attach(model, initialize=False)
    shapes: list[tuple[int, ...]] = []

    def loss(answers: torch.Tensor, head: torch.nn.Linear, targets: torch.Tensor) -> None:
        shapes.extend([tuple(answers.shape), tuple(targets.shape)])

    monkeypatch.setattr("lightning_peft.estimation.forward.chunked_loss", loss)
    forward(module, 3, 24, targets)
    assert shapes == [(3 * targets, 128), (3 * targets,)]
