"""GoRA (He et al. 2025, https://arxiv.org/abs/2502.12171): ranks and B from the weights' gradients.

With G the mean gradient of a weight W (d_out, d_in) over a sample:

* importance ``I = mean |W ⊙ G|``, shares of ``Σ r √(d_in + d_out)``, in which a component costs
  ``√(d_in + d_out)``, rounded down and clamped to [min_r, max_r];
* A starts as in LoRA, and B at ``-ξ G Aᵀ (A Aᵀ)⁻¹``, the least-squares fit of the gradient by A,
  with ``ξ = γ √(d_in / rank) / s``. A random A keeps √(rank / d_in) of a gradient's norm, so that
  ``‖s B A‖ ≈ γ ‖G‖``: the first forward is about that after a step of gradient descent at rate γ.

W stays what it is, so the model does *not* begin equal to its base.

Deviations: seen were the authors' code (hhnqqq/MyTransformers) and abstracts, not the paper's text.
Of the code's choices these are fixed: importance ``union_mean``, costs by root, B scaled by a rate
(``gora_scale_by_lr``; its other choice, a constant 16 / α, knows neither shape nor scaling), and
s = α / √rank of the layer's own rank (``gora_rank_stablize``, ``gora_dynamic_scaling``). The code
may also stop the sample early, or choose γ by the loss; this does not. A pseudo-inverse in float64
replaces its inverse with 1e-8 on the diagonal. G lies in the host's memory, 4 bytes a value.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.adapters.dense import dense_weight
from lightning_peft.adapters.layer import LoRALinear
from lightning_peft.errors import UserError
from lightning_peft.pruning.allotment import allot_by_cost
from lightning_peft.strategies.allotted import Allotted, Layers
from lightning_peft.strategies.base import Loss
from lightning_peft.strategies.observed_gradients import mean_gradients


class GoRA(Allotted):
    """LoRA whose ranks and start come from the gradients of the weights.

    Args:
        r: Rank at which LoRA has as many parameters, about.
        min_r: Lowest rank; r / 2 when None.
        max_r: Highest rank; 4 r when None.
        budget: As many parameters in all layers, about, as that many components spread evenly have;
            those of rank ``r`` when None.
        gamma: Rate γ of the step of gradient descent that B starts with, at least 0.
        sample_ratio: Share of the training set that the batches are taken from, in (0, 1].
        max_batches: The most batches to look at; None for the whole sample.
        use_rslora: Scale by ``lora_alpha / sqrt(rank)``.
        lora: The arguments that all strategies share.

    Raises:
        UserError: If a number lies outside its range.
    """

    begins_at_base = False

    def __init__(
        self,
        r: int = 8,
        min_r: int | None = None,
        max_r: int | None = None,
        budget: int | None = None,
        gamma: float = 0.05,
        sample_ratio: float = 0.1,
        max_batches: int | None = 64,
        use_rslora: bool = True,
        **lora: Any,
    ) -> None:
        super().__init__(
            r=r,
            min_r=max(r // 2, 1) if min_r is None else min_r,
            max_r=4 * r if max_r is None else max_r,
            budget=budget,
            sample_ratio=sample_ratio,
            max_batches=max_batches,
            use_rslora=use_rslora,
            **lora,
        )
        if not 0 <= gamma < math.inf:
            raise UserError(f"gamma must be a finite number of at least 0, got {gamma}.")
        self.gamma = gamma

    def look(self, model: nn.Module, batches: Iterator[Any], loss: Loss) -> dict[str, Tensor]:
        """Mean gradient of each layer's weight over batches, on the host."""
        return mean_gradients(model, batches, loss)

    def ranks(self, layers: Layers, found: dict[str, Any]) -> list[int]:
        """In proportion to the importance, a component of a larger weight costing more."""
        importance, costs = [], []
        for name, layer in layers.items():
            weight = dense_weight(layer.base)
            importance.append(float((weight * found[name].to(weight)).abs().mean()))
            costs.append(math.sqrt(layer.in_features + layer.out_features))
        own = [layer.r or 0 for layer in layers.values()]
        budget = sum(r * cost for r, cost in zip(own, costs, strict=True))
        budget *= self.components(layers) / sum(own)
        return allot_by_cost(importance, costs, budget, self.min_r, self.max_r)

    @torch.no_grad()
    def start(self, layer: LoRALinear, found: Any) -> None:
        """B at the least-squares fit of the gradient by A."""
        (A, _), (B, _) = layer.components()
        size = self.gamma * math.sqrt(layer.in_features / A.shape[0]) / layer.scaling
        B.copy_(-size * gradient_fit(found.to(A.device), A))


def gradient_fit(gradient: Tensor, A: Tensor) -> Tensor:
    """The B for which ``‖G - B A‖`` is least.

    Args:
        gradient: G, (d_out, d_in).
        A: (r, d_in).

    Returns:
        (d_out, r), float64.
    """
    return gradient.double() @ torch.linalg.pinv(A.detach().double())
