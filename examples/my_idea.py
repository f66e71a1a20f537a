"""A component may go if the others can say what it says."""

from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft import AdapterStrategy
from lightning_peft.adapters import LoRALinear, adapter_layers, keep_components


class MyIdea(AdapterStrategy):
    """Every few steps each layer loses the component nearest to the span of its others."""

    def __init__(self, r: int = 16, target_r: int = 4, every: int = 10, **lora: Any) -> None:
        super().__init__(r=r, **lora)
        self.target_r, self.every = target_r, every

    def before_step(self, model: nn.Module, optimizer: Any, global_step: int) -> None:
        for name, layer in adapter_layers(model).items():
            if global_step and global_step % self.every == 0 and layer.rank > self.target_r:
                kept = self.score(layer).argsort(descending=True)[:-1].sort().values
                keep_components(layer, kept, optimizer)
                self.note(global_step, name, "removed", layer.rank)

    def final_parameters(self, model: nn.Module) -> int | None:
        for layer in adapter_layers(model).values():
            keep_components(layer, torch.arange(min(layer.rank, self.target_r)))
        return super().final_parameters(model)

    def score(self, layer: LoRALinear) -> Tensor:
        A, B = layer.active_A.detach().double(), layer.active_B.detach().double()
        gram = (A @ A.T) * (B.T @ B)  # inner products of the matrices B_j A_j, (rank, rank)
        gram.diagonal().add_(1e-6 * gram.diagonal().mean() + 1e-30)  # twins have no inverse
        return 1 / torch.linalg.inv(gram).diagonal()
