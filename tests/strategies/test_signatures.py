"""Strategies of the earlier signatures run as before, and are told what to write."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

from lightning_peft.adapters import LoRALinear
from lightning_peft.strategies import AdapterStrategy


class Old(AdapterStrategy):
    def layer(self, base: nn.Module) -> LoRALinear:
        return LoRALinear(base, r=3, lora_alpha=5)

    def optimizer(self, params: Any, default: Any) -> Any:
        params = list(params)
        assert all(isinstance(p, nn.Parameter) for p in params)
        return default([{"params": params, "lr": 0.03}])


class OlderName(Old):
    def optimizer(self, parameters: Any, default: Any) -> Any:
        return super().optimizer(parameters, default)


class New(AdapterStrategy):
    def layer(self, base: nn.Module, name: str) -> LoRALinear:
        assert name in ("0", "2")
        return LoRALinear(base, r=3, lora_alpha=5)

    def optimizer(self, named_parameters: Any, default: Any) -> Any:
        return default([{"params": [p for _, p in named_parameters], "lr": 0.03}])


class Star(New):
    def layer(self, *args: Any) -> LoRALinear:
        return super().layer(*args)

    def optimizer(self, *args: Any, **more: Any) -> Any:
        return super().optimizer(*args, **more)


class Named(New):
    def layer(self, base: nn.Module, name: str = "", *, factor: int = 1) -> LoRALinear:
        return super().layer(base, name)


LAYER = r"^{}\.layer\(self, base\) is the old form; write layer\(self, base, name\)\.$"
OPTIMIZER = (
    r"^{}\.optimizer\(self, params, default\) is the old form; "
    r"write optimizer\(self, named_parameters, default\)\.$"
)


@contextmanager
def silence() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def trained(strategy: AdapterStrategy, model: nn.Module, optimizer: Any) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    for step in range(3):
        model(torch.randn(8, 4, generator=generator)).square().mean().backward()
        strategy.before_step(model, optimizer, step)
        optimizer.step()
        strategy.after_step(model, optimizer, step)
        optimizer.zero_grad()
    return [p.detach() for p in model.parameters() if p.requires_grad]


def run(strategy: AdapterStrategy, make: Any, layer: Any, optimizer: Any) -> list[torch.Tensor]:
    """Train inside of two contexts, in which attaching and making the optimizer may warn."""
    model = make()
    with layer:
        strategy.attach(model)
    with optimizer:
        made = strategy.make_optimizer(model, lambda params: torch.optim.AdamW(params, lr=9.0))
    assert [group["lr"] for group in made.param_groups] == [0.03]
    return trained(strategy, model, made)


@pytest.mark.parametrize("old", [Old, OlderName])
def test_the_old_forms_give_the_same_values_and_are_told_what_to_write(old, two_linears) -> None:
    told = [
        pytest.warns(DeprecationWarning, match=m.format(old.__name__)) for m in (LAYER, OPTIMIZER)
    ]
    ours = run(old(), two_linears, *told)
    new = run(New(), two_linears, silence(), silence())
    assert len(ours) == 4
    assert all(map(torch.equal, ours, new))


@pytest.mark.parametrize("new", [New, Star, Named])
def test_the_new_forms_are_told_nothing(new, two_linears) -> None:
    values = run(new(), two_linears, silence(), silence())
    assert [value.shape[0] for value in values] == [3, 4, 3, 2]


def test_groups_by_name_are_loraplus(two_linears) -> None:
    class LoRAPlus(AdapterStrategy):
        def optimizer(self, named_parameters: Any, default: Any) -> Any:
            A, B = [], []
            for name, parameter in named_parameters:
                (B if name.endswith("lora_B") else A).append(parameter)
            return default([{"params": A}, {"params": B, "lr": 0.16}])

    model, strategy = two_linears(), LoRAPlus(r=2)
    strategy.attach(model)
    with silence():
        optimizer = strategy.make_optimizer(model, lambda p: torch.optim.SGD(p, lr=0.01))
    groups = {group["lr"]: group["params"] for group in optimizer.param_groups}
    layers = [model[0], model[2]]
    assert [id(p) for p in groups[0.01]] == [id(layer.lora_A) for layer in layers]
    assert [id(p) for p in groups[0.16]] == [id(layer.lora_B) for layer in layers]
    before = [layer.lora_B.detach().clone() for layer in layers]
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    for layer, start in zip(layers, before, strict=True):
        torch.testing.assert_close(layer.lora_B.detach(), start - 0.16 * layer.lora_B.grad)
