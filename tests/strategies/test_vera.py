"""VeRA against PEFT's, from the seed of the projection on."""

from __future__ import annotations

import pytest
import torch

from lightning_peft import trainable_parameters
from lightning_peft.adapters import adapter_layers, merge, save_peft
from lightning_peft.adapters.gates import gate_diagonal
from lightning_peft.strategies import RankDropout, VeRA
from lightning_peft.testing import check_strategy


def test_projection_forward_and_gradients_are_pefts(tiny_llama, random_batch, gradients) -> None:
    peft = pytest.importorskip("peft")
    targets = ["q_proj", "v_proj", "down_proj"]
    config = peft.VeraConfig(r=16, target_modules=targets, projection_prng_key=5)
    theirs = peft.get_peft_model(tiny_llama(), config)
    ours = tiny_llama()
    VeRA(r=16, target_modules=targets, projection_prng_key=5).attach(ours)
    pairs = {
        name: (layer, theirs.get_submodule(f"base_model.model.{name}"))
        for name, layer in adapter_layers(ours).items()
    }
    for layer, other in pairs.values():
        torch.nn.init.normal_(layer.output_scale, std=0.3)
        with torch.no_grad():
            other.vera_lambda_b["default"].copy_(layer.output_scale)
    layer, other = next(iter(pairs.values()))
    torch.testing.assert_close(layer.lora_A, other.vera_A["default"], rtol=0, atol=0)
    torch.testing.assert_close(layer.lora_B, other.vera_B["default"], rtol=0, atol=0)
    batch = random_batch(3)
    torch.testing.assert_close(gradients(ours, batch), gradients(theirs, batch))
    for layer, other in pairs.values():
        torch.testing.assert_close(layer.output_scale.grad, other.vera_lambda_b["default"].grad)
        (values,) = layer.gate.parameters()
        torch.testing.assert_close(values.grad, other.vera_lambda_d["default"].grad)


def test_merging_and_peft_keep_the_function(tiny_llama, random_batch, logits, tmp_path) -> None:
    peft = pytest.importorskip("peft")
    model = tiny_llama()
    VeRA(r=16, rank_gate=lambda r: RankDropout(r, 0.5)).attach(model)
    for layer in adapter_layers(model).values():
        torch.nn.init.normal_(layer.output_scale, std=0.3)
    expected = logits(model, batch := random_batch(0))
    save_peft(model, tmp_path)
    loaded = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path)
    torch.testing.assert_close(logits(loaded, batch), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(merge(model), batch), expected, rtol=1e-5, atol=1e-5)


def test_only_the_vectors_train(tiny_llama) -> None:
    model = tiny_llama()
    VeRA(r=16, target_modules=["q_proj", "v_proj"]).attach(model)
    assert trainable_parameters(model) == 2 * (16 + 32 + 16 + 16)
    layer = next(iter(adapter_layers(model).values()))
    assert gate_diagonal(layer.gate, 16).tolist() == pytest.approx([0.1] * 16)


@pytest.mark.parametrize("arguments", [{}, {"rank_gate": lambda r: RankDropout(r, 0.3)}])
def test_keeps_a_strategys_promises(arguments) -> None:
    check_strategy(VeRA(r=16, **arguments))
