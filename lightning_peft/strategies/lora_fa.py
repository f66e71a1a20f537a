"""LoRA-FA (Zhang et al. 2023, https://arxiv.org/abs/2308.03303): A stays as it was drawn, B trains.

``ΔW = s B A`` with A frozen moves each weight within the space of A's rows, by d_out r values
instead of (d_in + d_out) r.

This is the method of the paper's first version. Its second (2026), and PEFT's
``create_lorafa_optimizer``, also replace the gradient g of B by ``g (A Aᵀ)⁻¹ / s²``, whose change
of W is nearest to the full gradient; Adam then sees that one. Here B follows its own gradient,
under any optimizer.
"""

from __future__ import annotations

from torch import nn

from lightning_peft.adapters.layer import LoRALinear
from lightning_peft.strategies.base import AdapterStrategy


class LoRAFA(AdapterStrategy):
    """LoRA whose A is frozen; it is saved and exported with B."""

    def layer(self, base: nn.Module, name: str) -> nn.Module:
        """A LoRA layer of which B alone trains."""
        made = super().layer(base, name)
        assert isinstance(made, LoRALinear)
        (A, _), _ = made.components()
        A.requires_grad_(False)
        return made
