"""PiSSA (Meng et al. 2024, https://arxiv.org/abs/2404.02948): LoRA from the principal part.

A and B start at the r largest singular values and vectors of each weight, which the frozen base
loses: ``y = (W - s B₀A₀) x + s B A x``. With r = lora_alpha, as in the paper, s is 1 and
``A₀ = √S_r V_rᵀ``, ``B₀ = U_r √S_r``; for another scaling both are divided by √s, as in PEFT.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_peft.errors import UserError
from lightning_peft.pruning.initialisation import principal_factors
from lightning_peft.strategies.starts_inside import StartsInside


class PiSSA(StartsInside):
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

    def __init__(
        self, r: int = 8, lora_alpha: float | None = None, niter: int | None = None, **lora: Any
    ) -> None:
        super().__init__(r, lora_alpha, **lora)
        if niter is not None and niter < 1:
            raise UserError(f"niter must be at least 1, got {niter}.")
        self.niter = niter

    def factors(self, weight: Tensor, r: int, scaling: float) -> tuple[Tensor, Tensor]:
        """The principal part of the weight."""
        return principal_factors(weight, r, scaling, self.niter)
