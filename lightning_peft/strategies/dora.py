"""DoRA (Liu et al. 2024, https://arxiv.org/abs/2402.09353): direction by LoRA, magnitude apart.

``W' = m ⊙ (W + s B A) / ‖W + s B A‖`` with the norm of each output row, equation 5; m starts at
‖W‖, and the norm is detached from the gradient (section 4.3). With input dropout the base's share
of the change is computed from the dropped input too, as in the authors' code and PEFT; only then
there is a second pass over W, ``y = W (x - d) + m ⊙ (W + s B A) d / ‖W + s B A‖`` for a dropped d.

The norm needs no dense product: ``‖W_i + L_i R‖² = ‖W_i‖² + 2 L_i · (R Wᵀ)_i + L_i (R Rᵀ) L_iᵀ``
for the factors L (d_out, rank) and R (rank, d_in), and ``R Wᵀ`` is R sent through the base,
quantized or not. It takes rank rows instead of two passes over a d_out × d_in matrix. A mask
between A and B enters the norm as it is in eval.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft.adapters.adapted import PeftForm
from lightning_peft.adapters.dense import dense_weight
from lightning_peft.adapters.dropout import InputDropout
from lightning_peft.adapters.layer import LoRALinear
from lightning_peft.strategies.base import AdapterStrategy


class DoRALinear(LoRALinear):
    """A linear adapted by DoRA.

    Args:
        base: The linear to adapt.
        lora: The arguments of :class:`LoRALinear`.
    """

    base_norm_sq: Tensor

    def __init__(self, base: nn.Module, *lora: Any, **more: Any) -> None:
        super().__init__(base, *lora, **more)
        if self.lora_A.is_meta:
            norm_sq = self.lora_A.new_empty(self.out_features)
        else:
            norm_sq = dense_weight(base).square().sum(1).to(self.lora_A.dtype)  # (d_out,)
        self.register_buffer("base_norm_sq", norm_sq, persistent=False)
        self.lora_magnitude = nn.Parameter(norm_sq.sqrt())

    def _through_base(self, x: Tensor) -> Tensor:
        """``W x`` without the bias, (..., d_in) to (..., d_out)."""
        y = self.base(x)
        return y if self.bias is None else y - self.bias

    @torch.no_grad()
    def weight_norm(self) -> Tensor:
        """‖W + s B A‖ of each row, in eval form, (d_out,)."""
        left, right = self.change()
        weight = self.weight
        rows = right.to(weight.dtype) if weight.is_floating_point() else right
        products = self._through_base(rows).to(right.dtype).T  # (d_out, rank): R Wᵀ, turned
        cross = (left * products).sum(1)
        own = ((left @ (right @ right.T)) * left).sum(1)
        return (self.base_norm_sq + 2 * cross + own).clamp_min(0).sqrt()

    def forward(self, x: Tensor) -> Tensor:
        """Compute ``m ⊙ (W + s B A) x / ‖W + s B A‖``, (..., d_in) to (..., d_out)."""
        scale = self.lora_magnitude / self.weight_norm()  # (d_out,)
        if not (self.training and isinstance(self.dropout, InputDropout)):
            y = self.adapted(x, None)  # W x + s B A x, in one pass over x
            rest = None if self.bias is None else (1 - scale) * self.bias
        else:
            dropped = self.dropout(x)
            y = self.adapted(dropped, None)
            rest = self.base(x - dropped)
            rest = rest if self.bias is None else rest - scale * self.bias
        # The scale is not rounded to half precision, where steps of 1/128 would be lost.
        change = y * scale if rest is None else torch.addcmul(rest.to(scale), y.to(scale), scale)
        return change.to(y.dtype)

    def merged_weight(self, base_weight: Tensor) -> Tensor:
        """``m ⊙ (W + s B A) / ‖W + s B A‖``, (d_out, d_in)."""
        left, right = self.change()
        weight = base_weight + left @ right
        return (self.lora_magnitude.detach() / weight.norm(dim=1))[:, None] * weight

    def delta_weight(self) -> Tensor:
        """ΔW against the base, in eval form, (d_out, d_in); of full rank."""
        weight = dense_weight(self.base)
        return self.merged_weight(weight) - weight

    @torch.no_grad()
    def delta_sq_norm(self, x: Tensor) -> Tensor:
        """‖ΔW x‖² for each token, in eval form, (..., d_in) to (...,); passes through the base."""
        left, right = self.change()
        scale = self.lora_magnitude / self.weight_norm()
        plain = self._through_base(x).to(left.dtype)
        change = F.linear(F.linear(x.to(right.dtype), right), left)
        return ((scale - 1) * plain + scale * change).square().sum(-1)

    def peft(self) -> PeftForm:
        """LoRA's two matrices and the magnitude, with ``use_dora``."""
        left, right = self.change()
        tensors = {
            "lora_A.weight": right,
            "lora_B.weight": left / self.scaling,
            "lora_magnitude_vector": self.lora_magnitude.detach(),
        }
        return PeftForm(tensors, config={"use_dora": True}, scaling=self.scaling)


class DoRA(AdapterStrategy):
    """LoRA whose weight keeps a trained magnitude of its own for each output.

    Args:
        lora: The arguments that all strategies share.
    """

    needs = frozenset({"whole weights"})
    layer_class = DoRALinear
