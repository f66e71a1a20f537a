"""LoRA-FA: A stays, B follows its own gradient, and both are saved."""

from __future__ import annotations

import pytest
import torch

from lightning_peft.adapters import (
    adapter_layers,
    adapter_state_dict,
    load_adapter_state,
    save_peft,
    trainable_parameters,
)
from lightning_peft.strategies import LoRA, RankDropout
from lightning_peft.strategies.lora_fa import LoRAFA
from lightning_peft.testing import check_strategy

TARGETS = ["q_proj", "v_proj", "down_proj"]


def sgd(params):
    return torch.optim.SGD(params, lr=0.1)


def test_steps_are_those_of_lora_whose_a_is_put_back(tiny_llama, random_batch) -> None:
    models, optimizers = [], []
    for strategy in (LoRAFA(r=4), LoRA(r=4)):
        torch.manual_seed(0)
        strategy.attach(model := tiny_llama())
        models.append(model)
        optimizers.append(strategy.make_optimizer(model, torch.optim.AdamW))
    frozen, plain = (adapter_layers(model) for model in models)
    start = {name: layer.lora_A.detach().clone() for name, layer in frozen.items()}
    for step in range(4):
        for model, optimizer in zip(models, optimizers, strict=True):
            model(**random_batch(step)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        for name, layer in plain.items():
            with torch.no_grad():
                layer.lora_A.copy_(start[name])
    for name, layer in frozen.items():
        assert torch.equal(layer.lora_A, start[name])
        torch.testing.assert_close(layer.lora_B, plain[name].lora_B, rtol=1e-5, atol=1e-7)
        assert layer.lora_B.any()


def test_peft_trains_the_same_form_by_a_corrected_gradient(pair, random_batch) -> None:
    peft = pytest.importorskip("peft")
    from peft.optimizers import create_lorafa_optimizer

    config = peft.LoraConfig(r=4, lora_alpha=12, target_modules=TARGETS)
    ours, theirs = pair(LoRAFA(r=4, lora_alpha=12, target_modules=TARGETS), config)
    optimizer = create_lorafa_optimizer(theirs, r=4, lora_alpha=12, lr=1e-3)
    losses = [model(**random_batch(0)).loss for model in (ours, theirs)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(*losses)
    layers = adapter_layers(ours)
    for name, layer in layers.items():
        other = theirs.get_submodule(f"base_model.model.{name}")
        assert layer.lora_A.grad is other.lora_A.default.weight.grad is None
        torch.testing.assert_close(
            layer.lora_B.grad, other.lora_B.default.weight.grad, rtol=1e-4, atol=1e-7
        )
    optimizer.step()
    for name, layer in layers.items():
        A = layer.lora_A.detach()
        corrected = layer.lora_B.grad @ torch.linalg.inv(A @ A.T) / 3.0**2
        first = optimizer.state[f"base_model.model.{name}.lora"]["exp_avg_B"] / 0.1
        size = float(corrected.abs().max())  # PEFT multiplies in bfloat16
        torch.testing.assert_close(first, corrected, rtol=0.02, atol=0.02 * size)
        assert (first - layer.lora_B.grad).abs().max() > 0.5 * size


def test_b_alone_trains(tiny_llama) -> None:
    strategy = LoRAFA(r=4, target_modules=["q_proj", "v_proj"])
    report = strategy.attach(model := tiny_llama())
    assert report.trainable == trainable_parameters(model) == 2 * 4 * (32 + 16)
    assert strategy.final_parameters(model) == 2 * 4 * (32 + 16)
    optimizer = strategy.make_optimizer(model, sgd)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(layer.lora_B) for layer in adapter_layers(model).values()}


def test_a_is_saved_and_restored(tiny_llama, random_batch, logits, tmp_path) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    LoRAFA(r=4).attach(model := tiny_llama())
    for layer in adapter_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.2)
    expected = logits(model, batch := random_batch(0))
    torch.manual_seed(1)
    LoRAFA(r=4).attach(other := tiny_llama(), initialize=False)
    load_adapter_state(other, adapter_state_dict(model))
    assert torch.equal(logits(other, batch), expected)
    assert not any(layer.lora_A.requires_grad for layer in adapter_layers(other).values())
    save_peft(model, tmp_path)
    loaded = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path)
    torch.testing.assert_close(logits(loaded, batch), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        pytest.param(
            {"modules_to_save": ["lm_head"], "rank_gate": lambda r: RankDropout(r, 0.3)},
            marks=pytest.mark.long,
        ),
    ],
)
def test_keeps_a_strategys_promises(arguments) -> None:
    check_strategy(LoRAFA(r=4, **arguments))


@pytest.mark.slow
def test_two_processes_agree() -> None:
    check_strategy(LoRAFA(r=4), processes=2)
