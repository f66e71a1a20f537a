"""OLoRA: factors and residual are PEFT's, and the base loses what A and B hold."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_peft.adapters import adapter_layers, merge, save_peft, trainable_parameters
from lightning_peft.strategies import RankDropout
from lightning_peft.strategies.olora import OLoRA
from lightning_peft.testing import check_strategy


@pytest.mark.parametrize("lora_alpha", [4, 8])
def test_factors_and_residual_are_pefts(lora_alpha, tiny_llama) -> None:
    peft = pytest.importorskip("peft")
    targets = ["q_proj", "v_proj", "up_proj", "down_proj"]
    config = peft.LoraConfig(
        r=4, lora_alpha=lora_alpha, target_modules=targets, init_lora_weights="olora"
    )
    theirs = peft.get_peft_model(tiny_llama(), config)
    ours = tiny_llama()
    OLoRA(r=4, lora_alpha=lora_alpha, target_modules=targets).attach(ours)
    for name, layer in adapter_layers(ours).items():
        other = theirs.get_submodule(f"base_model.model.{name}")
        close = {"rtol": 1e-5, "atol": 1e-6}
        torch.testing.assert_close(layer.lora_A, other.lora_A.default.weight, **close)
        torch.testing.assert_close(layer.lora_B, other.lora_B.default.weight, **close)
        torch.testing.assert_close(layer.base.weight, other.base_layer.weight, **close)


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_b_is_an_orthonormal_basis_of_the_first_columns(shape) -> None:
    torch.manual_seed(0)
    base = nn.Linear(*shape)
    weight = base.weight.detach().clone()
    strategy = OLoRA(r=3)
    layer = strategy.layer(base, "q")
    strategy.initialize(layer)
    B = layer.lora_B.detach()
    torch.testing.assert_close(B.T @ B, torch.eye(3), rtol=1e-5, atol=1e-5)
    # Without pivoting the first r columns of the weight are all in the adapter.
    assert layer.base.weight[:, :3].abs().max() < 1e-6
    torch.testing.assert_close(layer.base.weight + B @ layer.lora_A, weight)
    assert layer.delta_weight().abs().max() < 1e-6


def test_it_is_exported_against_the_original_base(
    tiny_llama, random_batch, logits, tmp_path
) -> None:
    peft = pytest.importorskip("peft")
    OLoRA(r=4).attach(model := tiny_llama())
    for layer in adapter_layers(model).values():
        with torch.no_grad():
            layer.lora_B += 0.2 * torch.randn_like(layer.lora_B)
    expected = logits(model, batch := random_batch(0))
    save_peft(model, tmp_path)
    loaded = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path)
    torch.testing.assert_close(logits(loaded, batch), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(merge(model), batch), expected, rtol=1e-5, atol=1e-5)


def test_it_trains_as_many_parameters_as_lora(tiny_llama) -> None:
    OLoRA(r=4, target_modules=["q_proj", "v_proj"]).attach(model := tiny_llama())
    assert trainable_parameters(model) == 2 * 4 * (32 + 32 + 32 + 16)


def test_a_rank_above_the_weights_is_refused(tiny_llama) -> None:
    sentence = "^r = 20 is above the 16 columns of Q of a 16 x 32 weight.$"
    with pytest.raises(ValueError, match=sentence):
        OLoRA(r=20, target_modules=["v_proj"]).attach(tiny_llama())


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        pytest.param(
            {"lora_dropout": 0.2, "rank_gate": lambda r: RankDropout(r, 0.3)},
            marks=pytest.mark.long,
        ),
    ],
)
def test_keeps_a_strategys_promises(arguments) -> None:
    check_strategy(OLoRA(r=4, **arguments))


@pytest.mark.slow
def test_two_processes_agree() -> None:
    check_strategy(OLoRA(r=4), processes=2)
