"""Each broken promise is named."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_peft.adapters import adapter_layers
from lightning_peft.strategies import AdapterStrategy, LoRA, LoRAPrune
from lightning_peft.testing import check_strategy


class Noise(nn.Module):
    def forward(self, z: Tensor) -> Tensor:
        return z * torch.rand_like(z)


class Tanh(nn.Module):
    def forward(self, z: Tensor) -> Tensor:
        return torch.tanh(2 * z)


class OwnGenerator(nn.Module):
    """Draws from its own stream in forward."""

    def __init__(self, r: int) -> None:
        super().__init__()
        self.random = torch.Generator().manual_seed(0)

    def forward(self, z: Tensor) -> Tensor:
        return z * torch.rand(z.shape, generator=self.random) if self.training else z


class HiddenScale(nn.Module):
    """Trained, but with a part that no buffer holds."""

    def __init__(self, r: int) -> None:
        super().__init__()
        self.seen = 0

    def forward(self, z: Tensor) -> Tensor:
        self.seen += self.training
        return z * (1 + self.seen)


class IdleParameter(nn.Module):
    def __init__(self, r: int) -> None:
        super().__init__()
        self.idle = nn.Parameter(torch.ones(r))

    def forward(self, z: Tensor) -> Tensor:
        return z


class IdleModule(AdapterStrategy):
    """Adds a module that nothing uses."""

    def attach(self, model: nn.Module, initialize=True) -> Any:
        report = super().attach(model)
        model.idle = nn.Linear(2, 2)
        return report


class NonzeroB(AdapterStrategy):
    def initialize(self, layer: Any) -> None:
        layer.reset_parameters(False)


class Forgetful(AdapterStrategy):
    """Counts steps of its own, and forgets the count on resume."""

    count = 0

    def before_step(self, model: nn.Module, optimizer: Any, global_step: int) -> None:
        self.count += 1
        if self.count > 8:
            for layer in adapter_layers(model).values():
                layer.lora_B.grad.mul_(2)  # AdamW notices a change of scale, not a scale


class Unfreezing(AdapterStrategy):
    def attach(self, model: nn.Module, initialize=True) -> Any:
        report = super().attach(model)
        model.get_submodule("model.norm").requires_grad_(True)
        return report


class WritesTheBase(AdapterStrategy):
    @torch.no_grad()
    def after_step(self, model: nn.Module, optimizer: Any, global_step: int) -> None:
        super().after_step(model, optimizer, global_step)
        for layer in adapter_layers(model).values():
            layer.base.weight.mul_(0.99)


class OldMoments(AdapterStrategy):
    """Shrinks parameter and gradient, but not the optimizer's state."""

    def before_step(self, model: nn.Module, optimizer: Any, global_step: int) -> None:
        if global_step == 4:
            for layer in adapter_layers(model).values():
                for parameter, dim in layer.components():
                    grad = parameter.grad.narrow(dim, 0, 2)
                    parameter.grad = None
                    parameter.data = parameter.data.narrow(dim, 0, 2)
                    parameter.grad = grad
                layer.rank = 2


class OtherParameter(AdapterStrategy):
    """Puts a new parameter in the old one's place, which no optimizer knows."""

    def after_step(self, model: nn.Module, optimizer: Any, global_step: int) -> None:
        super().after_step(model, optimizer, global_step)
        if global_step == 4:
            for layer in adapter_layers(model).values():
                layer.lora_A = nn.Parameter(layer.lora_A.detach()[:2])
                layer.lora_B = nn.Parameter(layer.lora_B.detach()[:, :2])
                layer.rank = 2


class Opaque:
    pass


class OpaqueState(AdapterStrategy):
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "thing": Opaque()}


class Exploding(AdapterStrategy):
    def penalty(self, model: nn.Module) -> Tensor:
        return sum(layer.lora_B.exp().sum() for layer in adapter_layers(model).values()) * float(
            "inf"
        )


class CountsForwards(AdapterStrategy):
    """A statistic that recomputation counts twice."""

    def attach(self, model: nn.Module, initialize=True) -> Any:
        report = super().attach(model)
        self.forwards = 0
        next(iter(adapter_layers(model).values())).register_forward_hook(self._count)
        return report

    def _count(self, layer: nn.Module, args: Any, output: Any) -> None:
        self.forwards += layer.training

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "forwards": self.forwards}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.forwards = state_dict["forwards"]


class Unfolded(AdapterStrategy):
    """Its layers forget their gate when they are merged or exported."""

    def attach(self, model: nn.Module, initialize=True) -> Any:
        report = super().attach(model)
        for layer in adapter_layers(model).values():
            layer.register_forward_hook(lambda layer, args, y: 2 * y - layer.base(*args))
        return report


class WritesASmallerBase(LoRAPrune):
    """Takes columns of a weight away, as it may, and changes another."""

    def after_step(self, model: nn.Module, optimizer: Any, global_step: int) -> None:
        super().after_step(model, optimizer, global_step)
        if global_step == 4:
            model.get_submodule("model.layers.0.mlp.down_proj").base.weight.data[0, 0] += 1  # type: ignore[union-attr,operator]


BROKEN = {
    "random in eval": (LoRA(r=4, rank_gate=lambda r: Noise()), "eval is random"),
    "no diagonal": (LoRA(r=4, rank_gate=lambda r: Tanh()), "merged and unmerged differ"),
    "own generator": (LoRA(r=4, rank_gate=OwnGenerator), "torch's global stream"),
    "hidden state in a gate": (LoRA(r=4, rank_gate=HiddenScale), "after save and load the logits"),
    "idle parameter": (
        LoRA(r=4, rank_gate=IdleParameter),
        r"gate\.idle trains, but had no gradient other than zero in 12 optimizer",
    ),
    "idle module": (
        IdleModule(r=4),
        r"idle\.weight trains, but had no gradient other than zero in 3 optimizer",
    ),
    "start": (NonzeroB(r=4), "after attach the model differs from its base"),
    "forgotten state": (
        Forgetful(r=4),
        "saved after 2 steps and resumed ends with another .*lora_",
    ),
    "trains the base": (Unfreezing(r=4), r"the base's model\.norm\.weight trains"),
    "writes the base": (WritesTheBase(r=4), r"training changed the base's .*q_proj\.base\.weight"),
    "writes a smaller base": (
        WritesASmallerBase(r=4, start_step=2, removals=1),
        r"training changed the base's .*0\.mlp\.down_proj\.base\.weight",
    ),
    "old moments": (OldMoments(r=4), r"exp_avg of .*lora_A has shape \(4, 32\), .* \(2, 32\)"),
    "unknown parameter": (OtherParameter(r=4), "is none of the optimizer's parameters"),
    "opaque state": (OpaqueState(r=4), "plain values and tensors only"),
    "infinite loss": (Exploding(r=4), "the first loss in training is inf"),
    "recomputation": (CountsForwards(r=4), "activation checkpointing changes state_dict"),
    "outside of the factors": (Unfolded(r=4), "merged and unmerged differ"),
}


@pytest.mark.parametrize(("strategy", "sentence"), BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_promise_is_named(strategy: AdapterStrategy, sentence: str) -> None:
    with pytest.raises(AssertionError, match=sentence):
        check_strategy(strategy)
