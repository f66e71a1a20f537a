"""How much each layer's adapter changes what the layer gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_peft import distributed
from lightning_peft.adapters import adapter_layers
from lightning_peft.strategies import LoRA, RankDropout
from lightning_peft.strategies.layer_importance import measure_importance


def test_importance_is_the_mean_square_over_attended_tokens(tiny_llama, random_batch) -> None:
    # Masks and dropout are off while importance is measured.
    torch.manual_seed(0)
    batches = [random_batch(i, rows=2 + i) for i in range(3)]
    model = tiny_llama(num_hidden_layers=3)
    targets = ["q_proj", "v_proj"]
    LoRA(r=3, target_modules=targets, lora_dropout=0.3, rank_gate=RankDropout).attach(model)
    inputs: dict[str, list[Any]] = {name: [] for name in adapter_layers(model)}
    for name, layer in adapter_layers(model).items():
        nn.init.normal_(layer.lora_B, std=0.3)
        layer.register_forward_pre_hook(
            lambda layer, args, name=name: inputs[name].append(args[0][mask].detach())
        )

    def loss(batch: Any) -> Any:
        nonlocal mask
        assert not model.training
        mask = batch["attention_mask"].bool()
        return model(**batch).loss

    mask = torch.ones(())
    importance = measure_importance(model, batches, loss)
    assert list(importance) == list(adapter_layers(model))
    for name, layer in adapter_layers(model).items():
        x = torch.cat(inputs[name])
        assert len(x) == sum(int(b["attention_mask"].sum()) for b in batches)
        naive = (x @ (2.0 * layer.lora_B @ layer.lora_A).T).square().sum(-1).mean()
        assert importance[name] == pytest.approx(naive.item(), rel=1e-5)
    assert model.training


class Experts(nn.Module):
    """Two linears, of which a batch visits the one that it names."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, name: str, x: Tensor) -> Tensor:
        return getattr(self, name)(x)


def experts() -> Experts:
    model = Experts()
    LoRA(r=2, lora_alpha=2).attach(model)
    for layer in adapter_layers(model).values():
        nn.init.normal_(layer.lora_B)
    return model


def naive(layer: Any, x: Tensor) -> float:
    return (x @ (layer.lora_B @ layer.lora_A).T).square().sum(-1).mean().item()


def test_a_layer_that_no_forward_visits_matters_nothing() -> None:
    model, x = experts(), torch.randn(5, 4)
    found = measure_importance(model, [x], lambda x: model("b", x).sum())
    assert found == {"a": 0.0, "b": pytest.approx(naive(model.b, x), rel=1e-5)}
    assert measure_importance(model, [], lambda x: model("b", x).sum()) == {"a": 0, "b": 0}


def test_it_is_the_mean_over_the_tokens_of_all_processes(monkeypatch) -> None:
    model, here, there = experts(), torch.randn(3, 4), torch.randn(5, 4)
    other = {"a": naive(model.a, there) * 5, "b": 0.0}, {"a": 5, "b": 0}

    def total(tensors: list[Tensor]) -> list[Tensor]:
        """Adds what the other process would send: the sums and the counts by layer."""
        return [
            t + torch.tensor(list(part.values()), dtype=t.dtype)
            for t, part in zip(tensors, other, strict=True)
        ]

    monkeypatch.setattr(distributed, "total", total)
    found = measure_importance(model, [here], lambda x: model("a", x).sum())
    assert found["a"] == pytest.approx(naive(model.a, torch.cat([here, there])), rel=1e-5)
    assert found["b"] == 0
