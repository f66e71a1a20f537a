"""OFT (Qiu et al. 2023, https://arxiv.org/abs/2306.07280): the base's inputs are rotated.

``y = W R x + b`` with a block-diagonal R. Each block is the Cayley transform of a skew-symmetric
matrix, ``R = (I - S)⁻¹ (I + S)``, which is the identity at S = 0 and orthogonal always. There is no
rank, no product of two matrices, and no form in PEFT for it as it is written here.
"""

from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft import AdapterStrategy
from lightning_peft.adapters import AdaptedLayer
from lightning_peft.errors import UserError


class OFTLinear(AdaptedLayer):
    def __init__(self, base: nn.Module, block_size: int) -> None:
        super().__init__(base)
        if self.in_features % block_size:
            raise UserError(
                f"block_size must divide the layer's {self.in_features} inputs, got {block_size}."
            )
        self.blocks, self.block_size = self.in_features // block_size, block_size
        values = block_size * (block_size - 1) // 2
        self.skew = nn.Parameter(torch.zeros(self.blocks, values, device=self.weight.device))

    def rotation(self) -> Tensor:
        """R's blocks, (blocks, block_size, block_size)."""
        S = self.skew.new_zeros(self.blocks, self.block_size, self.block_size)
        row, column = torch.triu_indices(self.block_size, self.block_size, 1)
        S = S.index_put((torch.arange(self.blocks)[:, None], row, column), self.skew)
        S = S - S.mT
        eye = torch.eye(self.block_size).to(S)
        return torch.linalg.solve(eye - S, eye + S)

    def forward(self, x: Tensor) -> Tensor:
        blocks = x.to(self.skew.dtype).unflatten(-1, (self.blocks, self.block_size))
        rotated = torch.einsum("nij,...nj->...ni", self.rotation(), blocks)
        return self.base(rotated.flatten(-2).to(x.dtype))

    def merged_weight(self, base_weight: Tensor) -> Tensor:
        blocks = base_weight.unflatten(1, (self.blocks, self.block_size))  # (d_out, blocks, size)
        return torch.einsum("onj,nji->oni", blocks, self.rotation().detach()).flatten(1)


class OFT(AdapterStrategy):
    def __init__(self, block_size: int = 4, **targets: Any) -> None:
        super().__init__(**targets)
        self.block_size = block_size

    def layer(self, base: nn.Module, name: str) -> OFTLinear:
        return OFTLinear(base, self.block_size)
