"""The pruning idea of ``docs/new_strategy.md``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lightning_peft.adapters import adapter_layers
from lightning_peft.testing import check_strategy


def test_keeps_the_promises_of_a_strategy(example) -> None:
    check_strategy(example("my_idea").MyIdea(r=4, target_r=2, every=4))


def test_example_removes_the_redundant_component(example, tiny_llama: Callable[..., Any]) -> None:
    strategy = example("my_idea").MyIdea(r=3, target_modules=["q_proj"])
    strategy.attach(model := tiny_llama())
    layer = next(iter(adapter_layers(model).values()))
    with torch.no_grad():
        layer.lora_B.normal_()
        layer.lora_B[:, 2] = layer.lora_B[:, 0]
        layer.lora_A[2] = layer.lora_A[0]
    assert strategy.score(layer).argmax() == 1


def test_example_says_what_trains_at_its_end(example, tiny_llama: Callable[..., Any]) -> None:
    strategy = example("my_idea").MyIdea(r=8, target_r=3, target_modules=["q_proj"])
    strategy.attach(model := tiny_llama())
    assert strategy.final_parameters(model) == 2 * 3 * (32 + 32)  # two layers of 32 x 32
