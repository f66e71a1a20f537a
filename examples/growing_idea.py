"""A layer whose adapter is pulled at most gets one component more."""

from typing import Any

import torch
from torch import nn

from lightning_peft import AdapterStrategy
from lightning_peft.adapters import LoRALinear, add_components, lora_layers
from lightning_peft.distributed import from_first


class GrowingIdea(AdapterStrategy):
    """Every few steps the layer with the largest gradient grows, up to ``max_r``."""

    def __init__(self, r: int = 2, max_r: int = 16, every: int = 5, **lora: Any) -> None:
        super().__init__(r=r, **lora)
        self.max_r, self.every = max_r, every

    def layer(self, base: nn.Module, name: str) -> nn.Module:
        return LoRALinear(base, **self.lora_arguments(name=name), max_r=self.max_r)

    def before_step(self, model: nn.Module, optimizer: Any, global_step: int) -> None:
        layers = {n: m for n, m in lora_layers(model).items() if m.rank < self.max_r}
        if global_step and global_step % self.every == 0 and layers:
            pull = {n: sum(g.norm() for g in m.whole_gradients()) for n, m in layers.items()}
            name = max(pull, key=pull.__getitem__)
            layer = layers[name]
            A = from_first(torch.randn(1, layer.in_features)) / layer.in_features**0.5
            B = torch.zeros(layer.out_features, 1)  # the function stays what it was
            add_components(layer, A, B, optimizer)
            self.note(global_step, name, "added", layer.rank)

    def final_parameters(self, model: nn.Module) -> int | None:
        return None  # which layers grow, only data decide
