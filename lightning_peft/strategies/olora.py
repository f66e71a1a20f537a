"""OLoRA (Büyükakyüz 2024, https://arxiv.org/abs/2406.01775): LoRA that starts at W = Q R.

``B₀ = Q_r`` are the first r columns, which are orthonormal, and ``A₀ = R_r`` the first r rows. The
base loses ``s Q_r R_r``, as in PEFT; with r = lora_alpha, the default here, s is 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_peft.errors import UserError
from lightning_peft.strategies.starts_inside import StartsInside


class OLoRA(StartsInside):
    """LoRA on the first columns of an orthonormal basis of each weight.

    Args:
        r: Rank.
        lora_alpha: Numerator of the scaling; r when None.
        lora: The arguments that all strategies share.

    Raises:
        UserError: At attach, if a base is quantized, or a weight has fewer than r rows or columns.
    """

    def factors(self, weight: Tensor, r: int, scaling: float) -> tuple[Tensor, Tensor]:
        """The first columns of Q and the first rows of R."""
        if r > min(weight.shape):
            raise UserError(
                f"r = {r} is above the {min(weight.shape)} columns of Q of a "
                f"{weight.shape[0]} x {weight.shape[1]} weight."
            )
        Q, R = torch.linalg.qr(weight)
        return Q[:, :r], R[:r]
