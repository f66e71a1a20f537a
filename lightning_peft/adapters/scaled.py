"""An adapted linear with trained scales: ``y = W x + s · v ⊙ B gate(A dropout(x))``.

The form of methods that share A and B among layers and train vectors of each layer's own: a scale
for each component (a :class:`RankScale` in the gate) and ``v``, one for each output.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.adapters.functional import add_up, base_and_down, is_plain
from lightning_peft.adapters.layer import LoRALinear, in_autocast


class ScaledLinear(LoRALinear):
    """LoRA whose output is scaled by a trained vector.

    Args:
        base: The linear to adapt.
        start: Of all output scales.
        lora: The arguments of :class:`LoRALinear`.
    """

    def __init__(self, base: nn.Module, *lora: Any, start: float = 1.0, **more: Any) -> None:
        super().__init__(base, *lora, **more)
        self.output_scale = nn.Parameter(
            torch.full((self.out_features,), start).to(self.lora_B)  # (d_out,)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Compute ``W x + s · v ⊙ B gate(A dropout(x))``, (..., d_in) to (..., d_out)."""
        x, lora_A, lora_B, scale = in_autocast(x, self.active_A, self.active_B, self.output_scale)
        y, z = base_and_down(self.base, x, lora_A, self.kept(x))
        if self.gate is not None:
            z = self.gate(z)
        # The scale of the outputs goes into B, which is smaller than an activation.
        return add_up(y, z, lora_B * scale[:, None], self.scaling, is_plain(self.base, x))

    def change(self) -> tuple[Tensor, Tensor]:
        """What eval adds to the base: ``left`` (d_out, rank) and ``right`` (rank, d_in)."""
        left, right = super().change()
        return left * self.output_scale.detach()[:, None], right
