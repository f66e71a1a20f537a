"""The sensitivity seen in the backward pass, against the gradient of a dense ΔW."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.func import functional_call

from lightning_peft.adapters import adapter_layers
from lightning_peft.strategies import LoRA
from lightning_peft.strategies.change_sensitivity import ChangeSensitivity


@pytest.fixture
def adapted(tiny_llama: Any) -> Any:
    """A model with adapters that have learned something, its layers, and what watches them."""
    LoRA(r=3, init_lora_weights=False, target_modules=["q_proj", "up_proj"]).attach(
        model := tiny_llama()
    )
    layers = adapter_layers(model)
    (seen := ChangeSensitivity()).start(layers)
    return model, layers, seen


def expected(model: Any, layers: Any, batch: Any) -> list[float]:
    """By the gradients of the base's weights, which are those of ΔW."""
    weights = {f"{n}.base.weight": layer.base.weight for n, layer in layers.items()}
    weights = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
    loss = functional_call(model.eval(), weights, kwargs=batch).loss
    grads = torch.autograd.grad(loss, list(weights.values()))
    model.train()
    changes = [layer.delta_weight() for layer in layers.values()]
    return [
        float((c * g).abs().sum() / math.sqrt(c.numel()))
        for c, g in zip(changes, grads, strict=True)
    ]


def test_it_is_that_of_a_dense_change(adapted: Any, random_batch: Any) -> None:
    model, layers, seen = adapted
    for batches in ([0], [1, 2]):
        for seed in batches:
            model(**random_batch(seed)).loss.backward()
        parts = [expected(model, layers, random_batch(seed)) for seed in batches]
        found = seen.take(layers)
        torch.testing.assert_close(found, torch.tensor(parts).sum(0))
    assert seen.take(layers).tolist() == [0.0] * len(layers)


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_counts_once(adapted: Any, random_batch: Any, reentrant: bool) -> None:
    model, layers, seen = adapted
    model(**random_batch(0)).loss.backward()
    once = seen.take(layers)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model(**random_batch(0)).loss.backward()
    torch.testing.assert_close(seen.take(layers), once)


def test_only_training_is_seen(adapted: Any, random_batch: Any) -> None:
    model, layers, seen = adapted
    model.eval()(**random_batch(0)).loss.backward()
    assert not seen.take(layers).any()
    seen.stop()
    model.train()(**random_batch(0)).loss.backward()
    assert not seen.take(layers).any()
