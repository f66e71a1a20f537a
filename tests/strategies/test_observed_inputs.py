"""The scatter of what enters each layer."""

from __future__ import annotations

import pytest
import torch

from lightning_peft.adapters import adapter_layers
from lightning_peft.errors import UserError
from lightning_peft.strategies import LoRA
from lightning_peft.strategies.observed_inputs import scatters


def test_it_is_the_covariance_of_attended_tokens_over_all_batches(tiny_llama, random_batch) -> None:
    model = tiny_llama()
    LoRA(r=2, lora_dropout=0.5, target_modules=["q_proj", "down_proj"]).attach(model)
    batches = [random_batch(seed, rows=3, length=5 + seed) for seed in range(3)]
    entered: dict[str, list[torch.Tensor]] = {name: [] for name in adapter_layers(model)}
    handles = [
        layer.register_forward_pre_hook(
            lambda _, args, name=name: entered[name].append(args[0].detach())
        )
        for name, layer in adapter_layers(model).items()
    ]
    model.eval()
    for batch in batches:
        model(**batch)
    for handle in handles:
        handle.remove()
    masks = [batch["attention_mask"].bool() for batch in batches]
    found = list(scatters(model.train(), iter(batches), lambda batch: model(**batch).loss))
    assert [name for name, _, _ in found] == list(entered)
    for name, layer, scatter in found:
        assert layer is model.get_submodule(name)
        x = torch.cat([x[mask] for x, mask in zip(entered[name], masks, strict=True)]).double()
        expected = torch.cov(x.T) * (len(x) - 1)
        torch.testing.assert_close(scatter.double(), expected, rtol=1e-4, atol=1e-5)


def test_a_loss_that_passes_the_model_by_is_refused(tiny_llama, random_batch) -> None:
    model = tiny_llama()
    LoRA(r=2).attach(model)
    with pytest.raises(UserError, match="no forward pass of the adapted model was seen"):
        list(scatters(model, iter([random_batch(0)]), lambda batch: torch.tensor(0.0)))
