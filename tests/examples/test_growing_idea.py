"""The growing idea of ``docs/new_strategy.md``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lightning_peft.adapters import lora_layers
from lightning_peft.testing import check_strategy


def test_keeps_the_promises_of_a_strategy(example) -> None:
    check_strategy(example("growing_idea").GrowingIdea(r=1, max_r=3, every=2))


def test_the_layer_with_the_largest_gradient_grows(example, tiny_llama: Callable[..., Any]) -> None:
    strategy = example("growing_idea").GrowingIdea(r=1, max_r=2, every=1)
    strategy.attach(model := tiny_llama())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    layers = lora_layers(model)
    for layer in layers.values():
        for parameter, _ in layer.components():
            parameter.grad = torch.zeros_like(parameter)
    chosen = list(layers)[5]
    layers[chosen].lora_B.grad.fill_(1.0)
    strategy.before_step(model, optimizer, 1)
    assert {name for name, layer in layers.items() if layer.rank == 2} == {chosen}
    assert strategy.decisions == [{"step": 1, "layer": chosen, "event": "added", "rank": 2}]
