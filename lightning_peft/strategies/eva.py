"""EVA (Paischer et al. 2024, https://arxiv.org/abs/2410.07170): A explains the inputs' variance.

A starts at the leading right singular vectors of a layer's inputs over a sample, padding left out,
and B at zero. Of the components of all layers those stay that explain the largest share of their
own layer's variance, r of them for each layer on average and ``rho`` times r in one at most. A
layer may lose all of its own, and is then left as it was.

Deviations: seen were PEFT's ``peft.tuners.lora.eva`` and abstracts, not the paper's text. As in
PEFT inputs are centred (a principal component analysis), shares are of the whole variance, and a
layer's scaling stays what it was at rank r (``adjust_scaling_factors``). PEFT goes round the sample
until a truncated, incremental decomposition no longer moves; here the covariance is exact after one
pass, and needs d_in² values of 4 bytes for each layer, in the host's memory. PEFT by default also
leaves out tokens without a target (``use_label_mask``); here a token counts if it is attended.
Between layers of one input (query, key, value) the earlier one gets a component more, in PEFT any.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.adapters.layer import LoRALinear
from lightning_peft.errors import UserError
from lightning_peft.pruning.allotment import allot_highest
from lightning_peft.pruning.covariance import principal
from lightning_peft.strategies.allotted import Allotted, Layers
from lightning_peft.strategies.base import Loss
from lightning_peft.strategies.observed_inputs import scatters

Directions = tuple[Tensor, Tensor]


class EVA(Allotted):
    """LoRA that starts at the principal directions of each layer's inputs.

    Args:
        r: Mean rank.
        rho: No layer gets more than ``round(rho * r)`` components, or than it has inputs; 1 leaves
            all ranks alike.
        min_r: Lowest rank.
        budget: Components in all layers together; as many as at rank ``r`` when None.
        sample_ratio: Share of the training set that is looked at, in (0, 1].
        max_batches: The most batches to look at; None for the whole sample.
        adjust_scaling_factors: Keep a layer's scaling at that of rank ``r``; else it is
            ``lora_alpha`` by its own rank.
        lora: The arguments that all strategies share.

    Raises:
        UserError: If a number lies outside its range.
    """

    bounds = "min_r or rho"

    def __init__(
        self,
        r: int = 16,
        rho: float = 2.0,
        min_r: int = 0,
        budget: int | None = None,
        sample_ratio: float = 0.1,
        max_batches: int | None = None,
        adjust_scaling_factors: bool = True,
        **lora: Any,
    ) -> None:
        if not 1 <= rho < math.inf:
            raise UserError(f"rho must be a finite number of at least 1, got {rho}.")
        if "max_r" in lora:
            raise UserError(
                f"max_r = {lora['max_r']}: EVA bounds ranks by rho times r; give rho = max_r / r."
            )
        super().__init__(
            r=r,
            min_r=min_r,
            max_r=round(rho * r),
            budget=budget,
            sample_ratio=sample_ratio,
            max_batches=max_batches,
            **lora,
        )
        self.rho, self.adjust_scaling_factors = rho, adjust_scaling_factors

    def most(self, layer: LoRALinear) -> int:
        """``rho`` times its own rank, but not more than it has inputs."""
        return min(round(self.rho * (layer.r or 0)), layer.in_features)

    def scaling(self, name: str, layer: LoRALinear, rank: int) -> float:
        """That of rank ``r``, unless it is to follow the rank."""
        return layer.scaling if self.adjust_scaling_factors else super().scaling(name, layer, rank)

    def look(self, model: nn.Module, batches: Iterator[Any], loss: Loss) -> dict[str, Directions]:
        """Shares of the variance and directions of each layer's inputs."""
        found = {}
        for name, layer, scatter in scatters(model, batches, loss):
            assert isinstance(layer, LoRALinear)
            A, most = layer.active_A.detach(), self.most(layer)
            shares, directions = principal(scatter.to(A.device))
            found[name] = shares[:most], directions[:most].to(A.dtype)
        return found

    def ranks(self, layers: Layers, found: dict[str, Any]) -> list[int]:
        """How many components of each layer explain the most, of all layers' components."""
        shares = [found[name][0].tolist() for name in layers]
        return allot_highest(shares, self.components(layers), self.min_r)

    @torch.no_grad()
    def start(self, layer: LoRALinear, found: Any) -> None:
        """A at the leading directions; where nothing came in, as LoRA starts."""
        shares, directions = found
        if shares.any():
            A, _ = layer.components()[0]
            A.copy_(directions[: len(A)])
