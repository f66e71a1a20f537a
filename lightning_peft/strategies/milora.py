"""MiLoRA (Wang et al. 2024, https://arxiv.org/abs/2406.09044): LoRA that starts at the minor part.

As PiSSA, with the r smallest singular values of each weight: what matters most in the base stays
frozen, and what matters least is free to change.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from lightning_peft.adapters.dense import dense_weight
from lightning_peft.adapters.layer import LoRALinear
from lightning_peft.adapters.residual import ResidualLinear
from lightning_peft.pruning.initialisation import minor_factors
from lightning_peft.strategies.base import AdapterStrategy


class MiLoRA(AdapterStrategy):
    """LoRA on the smallest singular values of each weight.

    Args:
        r: Rank.
        lora_alpha: Numerator of the scaling; r when None.
        lora: The arguments that all strategies share.

    Raises:
        ValueError: At attach, if a base is quantized.
    """

    needs = frozenset({"weights at attach"})

    def __init__(self, r: int = 8, lora_alpha: float | None = None, **lora: Any) -> None:
        super().__init__(r=r, lora_alpha=r if lora_alpha is None else lora_alpha, **lora)

    def layer(self, base: nn.Module) -> ResidualLinear:
        """LoRA whose start the base loses."""
        return ResidualLinear(
            base, self.r, self.lora_alpha, self.lora_dropout, self.use_rslora, self.gate(self.r)
        )

    def initialize(self, layer: LoRALinear) -> None:
        """Start at the minor part of the weight."""
        assert isinstance(layer, ResidualLinear)
        if not layer.lora_A.is_meta:
            layer.start_at(*minor_factors(dense_weight(layer.base), layer.r, layer.scaling))
