"""LoHa (Hyeon-Woo et al. 2022, https://arxiv.org/abs/2108.06098): a product of two products.

``ΔW = s (B₁ A₁) ⊙ (B₂ A₂)``, which has rank up to r² for the parameters of rank 2 r. PEFT has this
form, and its names and start are taken here: B₂'s partner begins at zero.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft import AdapterStrategy
from lightning_peft.adapters import AdaptedLayer, PeftForm


class LoHaLinear(AdaptedLayer):
    def __init__(self, base: nn.Module, r: int, alpha: float) -> None:
        super().__init__(base)
        self.r = self.rank = r
        self.scaling = alpha / r
        shapes = {"a": (self.out_features, r), "b": (r, self.in_features)}
        for name in ("w1_a", "w1_b", "w2_a", "w2_b"):
            matrix = torch.empty(shapes[name[-1]], device=self.weight.device)
            self.register_parameter(f"hada_{name}", nn.Parameter(matrix))
            if name == "w2_b":
                nn.init.zeros_(matrix)
            else:
                nn.init.kaiming_uniform_(matrix, a=math.sqrt(5))

    def change(self) -> Tensor:
        """ΔW, (d_out, d_in)."""
        first = self.hada_w1_a @ self.hada_w1_b
        return first * (self.hada_w2_a @ self.hada_w2_b) * self.scaling

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        return y + F.linear(x.to(self.hada_w1_a.dtype), self.change()).to(y.dtype)

    def merged_weight(self, base_weight: Tensor) -> Tensor:
        return base_weight + self.change().detach()

    def components(self) -> list[tuple[nn.Parameter, int]]:
        return [
            (self.hada_w1_a, 1),
            (self.hada_w1_b, 0),
            (self.hada_w2_a, 1),
            (self.hada_w2_b, 0),
        ]

    def peft(self) -> PeftForm:
        names = {id(parameter): name for name, parameter in self.named_parameters()}
        return PeftForm(
            tensors={  # dead components may stand behind the living ones
                names[id(parameter)]: parameter.detach().narrow(dim, 0, self.rank)
                for parameter, dim in self.components()
            },
            config={"peft_type": "LOHA", "r": self.rank, "alpha": self.scaling * self.rank},
        )


class LoHa(AdapterStrategy):
    """Product of two products.

    Args:
        r: Rank of each product.
        lora_alpha: Numerator of the scaling; r when None.
        targets: ``target_modules`` and what else says where adapters stand.
    """

    def __init__(self, r: int = 4, lora_alpha: float | None = None, **targets: Any) -> None:
        super().__init__(r=r, lora_alpha=r if lora_alpha is None else lora_alpha, **targets)

    def layer(self, base: nn.Module, name: str) -> LoHaLinear:
        return LoHaLinear(base, self.r, self.lora_alpha)
