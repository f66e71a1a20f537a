"""Ranks by Fisher information, as proposed for PEFT (issue 3203) and axolotl (pull request 3639).

The importance of a layer is the mean over its weight's values of the diagonal of the empirical
Fisher information, ``F = 1/T Σ (∂ℓ_t/∂W)²`` over T batches. Ranks are in proportion to it under a
budget of r components for each layer, clamped and rounded by largest remainder; the scaling is
``lora_alpha / rank``. Neither proposal was merged, and there is no paper.

Deviations: axolotl's code takes the gradients of B at the start, a random projection of the
weight's, for which both texts write F; here it is the weight's. It clamps to the floor after
rounding, so that its ranks may exceed the budget; here they sum to it. It keeps old rows of A where
a rank changes; here A is drawn anew. With several processes each squares the gradients of its own
batches, weighted by how many targets they have.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft import distributed
from lightning_peft.adapters.attach import lora_layers
from lightning_peft.pruning.allotment import allot
from lightning_peft.strategies.allotted import Allotted, Layers
from lightning_peft.strategies.base import Loss
from lightning_peft.strategies.observed_gradients import each_gradient, refuse_unseen


class FisherLoRA(Allotted):
    """LoRA with higher ranks where the loss is more sensitive to the weight.

    Args:
        r: Mean rank.
        min_r: Lowest rank.
        max_r: Highest rank; 2 r when None.
        budget: Components in all layers together; as many as at rank ``r`` when None.
        sample_ratio: Share of the training set that the batches are taken from, in (0, 1].
        max_batches: The most batches to look at; None for the whole sample.
        lora: The arguments that all strategies share.

    Raises:
        UserError: If a number lies outside its range.
    """

    def __init__(
        self,
        r: int = 8,
        min_r: int = 1,
        max_r: int | None = None,
        budget: int | None = None,
        sample_ratio: float = 0.1,
        max_batches: int | None = 8,
        **lora: Any,
    ) -> None:
        super().__init__(
            r=r,
            min_r=min_r,
            max_r=max_r,
            budget=budget,
            sample_ratio=sample_ratio,
            max_batches=max_batches,
            **lora,
        )

    def look(self, model: nn.Module, batches: Iterator[Any], loss: Loss) -> dict[str, float]:
        """Mean squared gradient of each layer's weight, over values and batches."""
        layers = lora_layers(model)
        sums = {name: torch.zeros((), dtype=torch.float64) for name in layers}

        def add(name: str, gradient: Tensor) -> None:
            norm = torch.linalg.vector_norm(gradient, dtype=torch.float64)  # squares may vanish
            sums[name] = sums[name].to(norm.device) + norm.square() / gradient.numel()

        model.train()
        each_gradient(model, batches, loss, add)
        refuse_unseen(any(bool(value) for value in sums.values()))
        (total,) = distributed.total([torch.stack([value.cpu() for value in sums.values()])])
        return dict(zip(layers, (total / self.seen).tolist(), strict=True))

    def ranks(self, layers: Layers, found: dict[str, Any]) -> list[int]:
        """In proportion to the importance."""
        budget = self.components(layers)
        return allot([found[name] for name in layers], budget, self.min_r, self.max_r)
