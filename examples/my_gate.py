"""Each forward uses the first k components, k drawn at random, so that they sort themselves."""

import torch
from torch import Tensor, nn

from lightning_peft import AdapterStrategy


class FirstComponents(nn.Module):
    def forward(self, z: Tensor) -> Tensor:  # (..., r)
        if not self.training:
            return z
        k = torch.randint(1, z.shape[-1] + 1, ())
        return z * (torch.arange(z.shape[-1]) < k).to(z)


class MyGate(AdapterStrategy):
    def gate(self, r: int) -> nn.Module:
        return FirstComponents()
