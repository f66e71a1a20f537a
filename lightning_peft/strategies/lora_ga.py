"""LoRA-GA (Wang et al. 2024, https://arxiv.org/abs/2407.05000): LoRA that starts from a gradient.

The gradient G of each weight is taken on a sample. With ``G = U S Vᵀ``, ``A₀ = c V_{1:r}ᵀ`` and
``B₀ = c U_{r+1:2r}``, where ``c = d_out^¼ / √γ``; the frozen base loses ``s B₀ A₀``. The first step
then follows the best approximation of G that rank 2 r allows.

Deviations: the formulas are those of the authors' code (``ArB2r`` and ``stable``, its defaults).
PEFT 0.21 has the method with another scale: there B₀ is multiplied by G's singular values, which
the authors leave out, and A₀ stays at length one. A layer whose gradient is zero (an idle expert)
has no direction, and starts as in LoRA.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import nn

from lightning_peft import distributed
from lightning_peft.adapters.attach import adapter_layers
from lightning_peft.adapters.finite import broken
from lightning_peft.adapters.residual import ResidualLinear
from lightning_peft.errors import UserError
from lightning_peft.pruning.singular_vectors import gradient_factors
from lightning_peft.strategies.base import AdapterStrategy, Loss, Sample
from lightning_peft.strategies.observed_gradients import mean_gradients
from lightning_peft.strategies.signatures import MakeOptimizer


class LoRAGA(AdapterStrategy):
    """LoRA that starts where its first step is that of full fine-tuning, as near as rank allows.

    In a plain loop call :meth:`prepare` after ``attach``, before the optimizer is made.

    Args:
        r: Rank, at most half of each weight's shorter side.
        gamma: γ; the larger, the smaller A and B start.
        batches: Batches of training data whose gradients are averaged, those of all processes
            together; the authors take 64 of two examples each.
        niter: Iterations of a randomised decomposition of 4 r vectors, as in the authors' code;
            None for the exact one, which takes minutes for a large model.
        lora: The arguments that all strategies share.

    Raises:
        UserError: If a number lies outside its range; at attach, if a base is quantized or has no
            2 r singular values; when it trains, if :meth:`prepare` was not called.
    """

    needs = frozenset({"weights at attach"})
    layer_class = ResidualLinear

    def __init__(
        self, r: int = 8, gamma: float = 16.0, batches: int = 64, niter: int | None = 4, **lora: Any
    ) -> None:
        super().__init__(r=r, **lora)
        if not 0 < gamma < math.inf:
            raise UserError(f"gamma must be a finite number above zero, got {gamma}.")
        for key, value in (("batches", batches), ("niter", niter)):
            if value is not None and value < 1:
                raise UserError(f"{key} must be at least 1, got {value}.")
        self.gamma, self.batches, self.niter = gamma, batches, niter
        self.started = False

    def layer(self, base: nn.Module, name: str) -> nn.Module:
        """A layer whose base can lose its start."""
        made = super().layer(base, name)
        assert isinstance(made, ResidualLinear)
        least = min(made.in_features, made.out_features)
        if 2 * made.r > least:
            raise UserError(
                f"r = {made.r}: LoRAGA takes {2 * made.r} singular vectors, and {name} has "
                f"{least}; give a rank of at most {least // 2} (rank_pattern, for this layer "
                "alone), or exclude_modules."
            )
        return made

    def initialize(self, layer: ResidualLinear) -> None:
        """Nothing: B is zero until :meth:`prepare`, so that gradients are the base's."""

    @property
    def looks_at_data(self) -> bool:
        """Unless layers have had their start."""
        return not self.started

    def prepare(
        self,
        model: nn.Module,
        sample: Sample,
        loss: Loss,
        optimizer: MakeOptimizer = torch.optim.AdamW,
        accumulate: int = 1,
    ) -> None:
        """Start each layer from its weight's gradient on a sample, the same on all processes."""
        if self.started:
            return
        layers = {n: m for n, m in adapter_layers(model).items() if isinstance(m, ResidualLinear)}
        own = math.ceil(self.batches / distributed.world_size())
        gradients = mean_gradients(model, itertools.islice(sample(1.0), own), loss)
        for name, layer in layers.items():
            gradient = gradients.pop(name)
            if found := broken(gradient):
                raise UserError(f"the gradient of {name} on the sample holds {found}.")
            if gradient.any():
                gradient = gradient.to(layer.start_A.device)
                B, A = gradient_factors(gradient, layer.r, self.gamma, self.niter)
                layer.start_at(distributed.from_first(B), distributed.from_first(A))
        self.started = True

    def state_dict(self) -> dict[str, Any]:
        """Decisions, and whether layers have had their start, which is saved with them."""
        return {**super().state_dict(), "started": self.started}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` gave."""
        super().load_state_dict(state_dict)
        self.started = state_dict["started"]
