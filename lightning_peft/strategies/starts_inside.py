"""What methods share that start A and B at a part of each weight, which the frozen base loses."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_peft.adapters.dense import dense_weight
from lightning_peft.adapters.residual import ResidualLinear
from lightning_peft.strategies.base import AdapterStrategy


class StartsInside(AdapterStrategy):
    """LoRA that starts at a part of the base's weight: ``y = (W - s B₀A₀) x + s B A x``.

    Args:
        r: Rank.
        lora_alpha: Numerator of the scaling; r when None.
        lora: The arguments that all strategies share.

    Raises:
        UserError: At attach, if a base is quantized.
    """

    needs = frozenset({"weights at attach"})
    layer_class = ResidualLinear

    def __init__(self, r: int = 8, lora_alpha: float | None = None, **lora: Any) -> None:
        super().__init__(r=r, lora_alpha=r if lora_alpha is None else lora_alpha, **lora)

    def factors(self, weight: Tensor, r: int, scaling: float) -> tuple[Tensor, Tensor]:
        """The part to start at.

        Args:
            weight: (d_out, d_in), dense.
            r: Rank.
            scaling: s.

        Returns:
            ``B₀`` (d_out, r) and ``A₀`` (r, d_in); the base loses ``s B₀ A₀``.
        """
        raise NotImplementedError

    def initialize(self, layer: ResidualLinear) -> None:
        """Move that part from the base to the adapter."""
        if not layer.start_A.is_meta:
            layer.start_at(*self.factors(dense_weight(layer.base), layer.r, layer.scaling))
