"""MiLoRA (Wang et al. 2024, https://arxiv.org/abs/2406.09044): LoRA that starts at the minor part.

As PiSSA, with the r smallest singular values of each weight: what matters most in the base stays
frozen, and what matters least is free to change.
"""

from __future__ import annotations

from torch import Tensor

from lightning_peft.pruning.initialisation import minor_factors
from lightning_peft.strategies.starts_inside import StartsInside


class MiLoRA(StartsInside):
    """LoRA on the smallest singular values of each weight.

    Args:
        r: Rank.
        lora_alpha: Numerator of the scaling; r when None.
        lora: The arguments that all strategies share.

    Raises:
        UserError: At attach, if a base is quantized.
    """

    def factors(self, weight: Tensor, r: int, scaling: float) -> tuple[Tensor, Tensor]:
        """The minor part of the weight."""
        return minor_factors(weight, r, scaling)
