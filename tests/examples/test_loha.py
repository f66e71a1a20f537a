"""LoHa against PEFT's: forward, gradients, and export, also where ranks differ."""

from __future__ import annotations

import json
import re
import warnings
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from lightning_peft import trainable_parameters
from lightning_peft.adapters import adapter_layers, keep_components, merge, save_peft
from lightning_peft.testing import check_strategy

TARGETS = ["q_proj", "v_proj", "down_proj"]
NAMES = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
KEEP = torch.tensor([0, 2, 3])


@pytest.fixture
def loha(example) -> ModuleType:
    return example("loha")


def filled(model: nn.Module) -> nn.Module:
    """Give every second product values, so that the change is not zero."""
    torch.manual_seed(3)
    for layer in adapter_layers(model).values():
        nn.init.normal_(layer.hada_w2_b, std=0.5)
    return model


def in_peft(base: nn.Module, folder: Any) -> Any:
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(base, folder)


@pytest.mark.parametrize("alpha", [None, 3])
def test_keeps_a_strategys_promises(alpha, loha) -> None:
    check_strategy(loha.LoHa(r=4, lora_alpha=alpha))


def test_forward_and_gradients_are_pefts(loha, tiny_llama, random_batch, gradients) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoHaConfig(r=4, alpha=6, target_modules=TARGETS)
    ours, theirs = tiny_llama(), peft.get_peft_model(tiny_llama(), config)
    loha.LoHa(r=4, lora_alpha=6, target_modules=TARGETS).attach(ours)
    pairs = [
        (layer, theirs.get_submodule(f"base_model.model.{name}"))
        for name, layer in adapter_layers(filled(ours)).items()
    ]
    assert len(pairs) == 6
    for layer, other in pairs:
        for name in NAMES:
            with torch.no_grad():
                getattr(other, name)["default"].copy_(getattr(layer, name))
    batch = random_batch(3)
    torch.testing.assert_close(gradients(ours, batch), gradients(theirs, batch))
    for layer, other in pairs:
        for name in NAMES:
            own = getattr(layer, name).grad
            assert own.abs().max() > 0
            torch.testing.assert_close(own, getattr(other, name)["default"].grad)
    trained = sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    assert trainable_parameters(ours) == trained


def test_the_start_is_pefts(loha) -> None:
    peft = pytest.importorskip("peft")
    base = nn.Linear(40, 30)
    torch.manual_seed(0)
    theirs = peft.get_peft_model(
        nn.Sequential(base), peft.LoHaConfig(r=4, target_modules=["0"])
    ).base_model.model[0]
    torch.manual_seed(0)
    ours = loha.LoHaLinear(base, 4, 4)
    assert all(torch.equal(getattr(ours, n), getattr(theirs, n)["default"]) for n in NAMES)
    assert not ours.hada_w2_b.any()
    assert ours.scaling == loha.LoHa(r=4).lora_alpha / 4 == 1


@pytest.mark.parametrize("resize", [True, False])
def test_removed_components_leave_both_products(resize, loha) -> None:
    torch.manual_seed(0)
    layer = loha.LoHaLinear(nn.Linear(7, 6).requires_grad_(False), 5, 10)
    nn.init.normal_(layer.hada_w2_b)
    a1, b1, a2, b2 = (getattr(layer, name).detach().clone() for name in NAMES)
    expected = 2 * (a1[:, KEEP] @ b1[KEEP]) * (a2[:, KEEP] @ b2[KEEP])
    keep_components(layer, KEEP, resize=resize)
    assert (layer.r, layer.rank) == (5, 3)
    x = torch.randn(4, 7)
    torch.testing.assert_close(layer.delta_weight(), expected)
    torch.testing.assert_close(layer(x), layer.base(x) + x @ expected.T)
    torch.testing.assert_close(layer.delta_sq_norm(x), (x @ expected.T).square().sum(-1))
    form = layer.peft()
    assert form.tensors["hada_w1_a"].shape == (6, 3)
    assert torch.equal(form.tensors["hada_w2_b"], b2[KEEP])
    assert (form.config["r"], form.config["alpha"]) == (3, 6)


def test_mixed_ranks_load_in_peft(loha, tiny_llama, random_batch, logits, tmp_path) -> None:
    model, batch = tiny_llama(), random_batch(1)
    base = logits(model, batch)
    loha.LoHa(r=4, lora_alpha=6, target_modules=TARGETS).attach(model)
    layers = adapter_layers(filled(model))
    odd, gone = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"
    keep_components(layers[odd], KEEP)
    keep_components(layers[gone], torch.tensor([], dtype=torch.long))
    expected = logits(model, batch)
    assert (expected - base).abs().max() > 0.05
    save_peft(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["alpha"]) == ("LOHA", 4, 6)
    assert config["rank_pattern"] == {"^" + re.escape(odd): 3}
    assert config["alpha_pattern"] == {"^" + re.escape(odd): 4.5}
    assert config["target_modules"] == [name for name in layers if name != gone]
    loaded = in_peft(tiny_llama(), tmp_path)
    torch.testing.assert_close(logits(loaded, batch), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(logits(merge(model), batch), expected, rtol=1e-4, atol=1e-5)
