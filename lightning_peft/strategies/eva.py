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

from lightning_peft import distributed
from lightning_peft.adapters.adapted import AdaptedLayer
from lightning_peft.adapters.attach import lora_layers
from lightning_peft.adapters.layer import LoRALinear
from lightning_peft.adapters.observe import observe_inputs
from lightning_peft.errors import UserError
from lightning_peft.pruning.allotment import allot_highest
from lightning_peft.pruning.covariance import Moments, moments, principal, together
from lightning_peft.strategies.allotted import Allotted, Layers
from lightning_peft.strategies.base import Loss
from lightning_peft.strategies.observed_gradients import refuse_unseen

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
        sums: dict[str, Moments] = {}

        def add(name: str, layer: AdaptedLayer, x: Tensor) -> None:
            if len(x):
                own = Moments(*(value.cpu() for value in moments(x)))
                sums[name] = together(sums[name], own) if name in sums else own

        model.eval()
        with torch.no_grad(), observe_inputs(model, add):
            for batch in batches:
                loss(batch)
        refuse_unseen(bool(sums))
        found = {}
        for name, layer in lora_layers(model).items():
            shares, directions = principal(_scatter(sums.pop(name, None), layer))
            most = self.most(layer)
            found[name] = shares[:most], directions[:most].to(layer.active_A.dtype)
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


def _scatter(own: Moments | None, layer: LoRALinear) -> Tensor:
    """The scatter of a layer's inputs on all processes, on the layer's device."""
    A = layer.active_A.detach()
    if own is None:  # an idle expert, or a process without a batch
        d = layer.in_features
        own = Moments(torch.zeros((), dtype=torch.float64), torch.zeros(d), torch.zeros(d, d))
    count, mean, scatter = own
    mean = mean.double()
    (total,) = distributed.total([count])
    (common,) = distributed.total([mean * count])
    gap = mean - common / total.clamp_min(1)
    (scatter,) = distributed.total([scatter + (count * torch.outer(gap, gap)).to(scatter.dtype)])
    return scatter.to(A.device)
