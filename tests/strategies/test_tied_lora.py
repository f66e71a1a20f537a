"""Tied-LoRA: which tensors are one, and that the function is the formula's."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_peft import trainable_parameters
from lightning_peft.adapters import adapter_layers
from lightning_peft.adapters.gates import rank_scale
from lightning_peft.strategies import RankDropout, TiedLoRA
from lightning_peft.strategies.tied_lora import block_of
from lightning_peft.testing import check_strategy


def test_one_a_one_b_for_each_kind_and_vectors_of_each_block(tiny_llama) -> None:
    model = tiny_llama()
    TiedLoRA(r=5, target_modules=["q_proj", "v_proj"]).attach(model)
    layers = adapter_layers(model)
    (q0, v0), (q1, v1) = (
        [layers[f"model.layers.{i}.self_attn.{kind}"] for kind in ("q_proj", "v_proj")]
        for i in (0, 1)
    )
    assert q0.lora_A is v0.lora_A is q1.lora_A is v1.lora_A
    assert q0.lora_B is q1.lora_B
    assert v0.lora_B is v1.lora_B
    assert q0.lora_B is not v0.lora_B
    assert rank_scale(q0.gate).values is rank_scale(v0.gate).values
    assert rank_scale(q0.gate).values is not rank_scale(q1.gate).values
    shared, blocks = 5 * 32 + 5 * (32 + 16), 2 * (5 + 32 + 16)
    assert trainable_parameters(model) == shared + blocks


def test_the_layer_is_the_papers_formula(tiny_llama) -> None:
    model = tiny_llama().eval()
    TiedLoRA(r=5, target_modules=["q_proj"]).attach(model)
    layer = next(iter(adapter_layers(model).values()))
    for parameter in (layer.lora_B, layer.output_scale, rank_scale(layer.gate).values):
        nn.init.normal_(parameter)
    x = torch.randn(7, 32)
    u, v = rank_scale(layer.gate).values, layer.output_scale
    expected = layer.base(x) + layer.scaling * v * ((u * (x @ layer.lora_A.T)) @ layer.lora_B.T)
    torch.testing.assert_close(layer(x), expected)


def test_blocks_are_told_by_the_last_number_of_a_name() -> None:
    assert block_of("model.layers.3.self_attn.q_proj") == block_of("model.layers.3.mlp.up_proj")
    assert block_of("layers.3.experts.1.up") != block_of("layers.3.experts.2.up")
    assert block_of("encoder.q") == block_of("encoder.v") == "encoder"


@pytest.mark.parametrize("arguments", [{}, {"rank_gate": lambda r: RankDropout(r, 0.3)}])
def test_keeps_a_strategys_promises(arguments) -> None:
    check_strategy(TiedLoRA(r=4, **arguments))
