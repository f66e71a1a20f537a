"""LoRA is the interface's defaults under their own name: PEFT's, value by value."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_peft.adapters import LoRALinear, adapter_layers
from lightning_peft.strategies import AdapterStrategy, LoRA


@pytest.mark.parametrize("more", [{}, {"use_rslora": True, "lora_alpha": 5}])
def test_forward_and_gradients_are_pefts(more, pair, random_batch, gradients) -> None:
    peft = pytest.importorskip("peft")
    shared: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "down_proj"], **more}
    config = peft.LoraConfig(**{"lora_alpha": 8, **shared})
    ours, theirs = pair(LoRA(**shared), config)
    batch = random_batch(3)
    torch.testing.assert_close(gradients(ours, batch), gradients(theirs, batch))
    for name, layer in adapter_layers(ours).items():
        other = theirs.get_submodule(f"base_model.model.{name}")
        for own, part in ((layer.lora_A, other.lora_A), (layer.lora_B, other.lora_B)):
            assert own.grad.abs().max() > 0
            torch.testing.assert_close(own.grad, part.default.weight.grad)


def test_it_adds_nothing_to_the_interface() -> None:
    assert [name for name in vars(LoRA) if not name.startswith("_")] == []
    assert LoRA.__mro__[1] is AdapterStrategy
    assert LoRA.layer_class is LoRALinear
