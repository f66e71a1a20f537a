"""PiSSA (Meng et al. 2024, https://arxiv.org/abs/2404.02948): LoRA from the principal part.

A and B start at the r largest singular values and vectors of each weight, which the frozen base
loses: ``y = (W - s B₀A₀) x + s B A x``. With r = lora_alpha, as in the paper, s is 1 and
``A₀ = √S_r V_rᵀ``, ``B₀ = U_r √S_r``; for another scaling both are divided by √s, as in PEFT.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from lightning_peft.adapters.dense import dense_weight
from lightning_peft.adapters.layer import LoRALinear
from lightning_peft.adapters.residual import ResidualLinear
from lightning_peft.errors import UserError
from lightning_peft.pruning.initialisation import principal_factors
from lightning_peft.strategies.base import AdapterStrategy


class PiSSA(AdapterStrategy):
    """LoRA on the principal singular values of each weight.

    Args:
        r: Rank.
        lora_alpha: Numerator of the scaling; r when None, as in the paper.
        niter: Iterations of a randomised decomposition, seconds instead of minutes for a large
            model (the paper uses 16); None for the exact one.
        lora: The arguments that all strategies share.

    Raises:
        UserError: If ``niter`` is below 1; at attach, if a base is quantized.
    """

    needs = frozenset({"weights at attach"})

    def __init__(
        self, r: int = 8, lora_alpha: float | None = None, niter: int | None = None, **lora: Any
    ) -> None:
        super().__init__(r=r, lora_alpha=r if lora_alpha is None else lora_alpha, **lora)
        if niter is not None and niter < 1:
            raise UserError(f"niter must be at least 1, got {niter}.")
        self.niter = niter

    def layer(self, base: nn.Module) -> ResidualLinear:
        """LoRA whose start the base loses."""
        return ResidualLinear(
            base, self.r, self.lora_alpha, self.lora_dropout, self.use_rslora, self.gate(self.r)
        )

    def initialize(self, layer: LoRALinear) -> None:
        """Start at the principal part of the weight."""
        assert isinstance(layer, ResidualLinear)
        if not layer.lora_A.is_meta:
            weight = dense_weight(layer.base)
            layer.start_at(*principal_factors(weight, layer.r, layer.scaling, self.niter))
