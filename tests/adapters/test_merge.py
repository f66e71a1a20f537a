"""A merged model is an ordinary one that computes the same."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_peft import merge
from lightning_peft.adapters import LoRALinear, adapter_layers
from lightning_peft.adapters.dense import dense_weight
from lightning_peft.strategies import DropLoRA, LoRA


def with_changes(model: nn.Module) -> nn.Module:
    for layer in adapter_layers(model).values():
        nn.init.normal_(layer.lora_B, std=0.1)
    return model


def test_merged_equals_unmerged_and_saves_as_an_ordinary_model(
    tiny_llama, random_batch, logits, tmp_path
) -> None:
    from transformers import LlamaForCausalLM

    model, batch = tiny_llama(), random_batch(1)
    base = logits(model, batch)
    names = set(model.state_dict())
    DropLoRA(r=3, mask="step", use_rslora=True).attach(model)
    expected = logits(with_changes(model), batch)
    assert (expected - base).abs().max() > 0.1
    merged = merge(model)
    torch.testing.assert_close(logits(merged, batch), expected, rtol=1e-4, atol=1e-5)
    assert not adapter_layers(merged)
    assert set(merged.state_dict()) == names
    merged.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, batch), logits(merged, batch))


def test_the_weight_is_the_sum_and_the_bias_stays() -> None:
    base = nn.Linear(5, 4)
    weight, bias = base.weight.detach().clone(), base.bias
    layer = LoRALinear(base, 2, 3)
    layer.reset_parameters(False)
    model = nn.Sequential(layer)
    change = 1.5 * (layer.lora_B @ layer.lora_A).detach()
    merge(model)
    assert model[0] is base
    torch.testing.assert_close(base.weight.detach(), weight + change)
    assert base.bias is bias


def test_a_half_precision_base_rounds_once() -> None:
    base = nn.Linear(5, 4, dtype=torch.bfloat16)
    weight = base.weight.detach().clone()
    layer = LoRALinear(base, 2, 3)
    layer.reset_parameters(False)
    expected = (weight.float() + layer.delta_weight()).to(torch.bfloat16)
    merge(nn.Sequential(layer))
    assert torch.equal(base.weight, expected)


def test_a_bare_model_cannot_be_merged(tiny_llama) -> None:
    with pytest.raises(ValueError, match="no adapters to merge"):
        merge(tiny_llama())


def test_a_quantized_base_is_merged_only_when_asked() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    plain = nn.Linear(64, 32)
    base = bnb.nn.Linear4bit(64, 32, compute_dtype=torch.float32, quant_type="nf4")
    base.load_state_dict(plain.state_dict())
    base = base.to("cpu")
    model = nn.Sequential(base)
    LoRA(r=4).attach(model)
    layer = with_changes(model)[0]
    x = torch.randn(10, 64)
    assert layer.lora_A.dtype == torch.float32
    torch.testing.assert_close(dense_weight(base), plain.weight.detach(), rtol=0, atol=0.03)
    expected = model(x).detach()
    with pytest.raises(ValueError, match="0 is a Linear4bit: .* dequantize=True"):
        merge(model)
    assert model[0] is layer
    merge(model, dequantize=True)
    assert type(model[0]) is nn.Linear
    torch.testing.assert_close(model(x), expected, rtol=1e-3, atol=1e-3)
