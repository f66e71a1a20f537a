"""LoRA (Hu et al. 2021, https://arxiv.org/abs/2106.09685), and rsLoRA with ``use_rslora``."""

from __future__ import annotations

from lightning_peft.strategies.base import AdapterStrategy


class LoRA(AdapterStrategy):
    """``y = W x + s · B A dropout(x)``: the interface's defaults under their own name."""
