"""Sparse Adapter (He et al. 2022, https://arxiv.org/abs/2210.04284) on LoRA, by SNIP.

The values of A and B with the highest ``|w · g|`` (Lee et al. 2018, https://arxiv.org/abs/1810.02340)
over all layers are kept, the others are zero from then on. The paper scores before training, where
for LoRA every score is zero: B is, and so the gradient of A is. Here the score is taken at
``start_step``, after some steps of ordinary training.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_peft import distributed
from lightning_peft.adapters.attach import lora_layers
from lightning_peft.adapters.layer import LoRALinear
from lightning_peft.adapters.state import trainable_parameters
from lightning_peft.errors import UserError
from lightning_peft.strategies.base import AdapterStrategy


class SparseLinear(LoRALinear):
    """LoRA of which single values may be fixed at zero.

    Args:
        base: The linear to adapt.
        lora: The arguments of :class:`LoRALinear`.
    """

    mask_A: Tensor
    mask_B: Tensor

    def __init__(self, base: nn.Module, *lora: Any, **more: Any) -> None:
        super().__init__(base, *lora, **more)
        self.register_buffer("mask_A", torch.ones_like(self.lora_A, dtype=torch.bool))
        self.register_buffer("mask_B", torch.ones_like(self.lora_B, dtype=torch.bool))

    def masked(self) -> list[tuple[nn.Parameter, Tensor]]:
        """Each matrix with the mask of what trains in it."""
        return [(self.lora_A, self.mask_A), (self.lora_B, self.mask_B)]

    def trained_values(self, parameter: nn.Parameter) -> int:
        """How many values of a parameter are not fixed at zero."""
        for own, mask in self.masked():
            if own is parameter and not mask.is_meta:
                return int(mask.sum())
        return super().trained_values(parameter)


class SparseAdapter(AdapterStrategy):
    """LoRA whose least salient values are fixed at zero.

    Args:
        r: Rank.
        sparsity: Share of all values that are fixed, in [0, 1).
        start_step: Optimizer step (0-based) at which they are chosen, at least 1: at step 0 every
            score is zero.
        lora: The arguments that all strategies share.

    Raises:
        UserError: If a number lies outside its range.
    """

    needs = frozenset({"whole steps"})
    layer_class = SparseLinear

    def __init__(
        self, r: int = 8, sparsity: float = 0.5, start_step: int = 20, **lora: Any
    ) -> None:
        super().__init__(r=r, **lora)
        if not 0 <= sparsity < 1:
            raise UserError(f"sparsity must lie in [0, 1), got {sparsity}.")
        if start_step < 1:
            raise UserError(
                f"start_step must be at least 1, since at step 0 B is zero and with it every "
                f"score, got {start_step}."
            )
        self.sparsity, self.start_step = sparsity, start_step

    def before_step(self, model: nn.Module, optimizer: Optimizer, global_step: int) -> None:
        """Choose the masks when that is due, and hold what is fixed."""
        layers = lora_layers(model)
        if global_step == self.start_step:
            self._choose(layers, optimizer)
            for name, layer in layers.items():
                self.note(global_step, name, "masked", layer.rank)
        if global_step >= self.start_step:
            for parameter, mask in _masked(layers):
                if parameter.grad is not None:
                    parameter.grad.mul_(mask)

    def final_parameters(self, model: nn.Module) -> int:
        """The count without the share that the masks take away."""
        values = sum(parameter.numel() for parameter, _ in _masked(lora_layers(model)))
        return trainable_parameters(model, include_saved=True) - int(self.sparsity * values)

    @torch.no_grad()
    def _choose(self, layers: dict[str, LoRALinear], optimizer: Optimizer) -> None:
        pairs = _masked(layers)
        scores = [snip_score(parameter, parameter.grad) for parameter, _ in pairs]
        kept = keep_highest(scores, self.sparsity)
        for (parameter, mask), keep in zip(pairs, kept, strict=True):
            mask.copy_(keep)
            parameter.mul_(mask)
            for value in distributed.moments(parameter, optimizer).values():
                value.mul_(mask)


def _masked(layers: dict[str, LoRALinear]) -> list[tuple[nn.Parameter, Tensor]]:
    return [
        pair
        for layer in layers.values()
        if isinstance(layer, SparseLinear)
        for pair in layer.masked()
    ]


def snip_score(weight: Tensor, grad: Tensor | None) -> Tensor:
    """|w · g| of each value, in the shape of ``weight``; zero where no gradient came."""
    return torch.zeros_like(weight) if grad is None else (weight * grad).abs()


def keep_highest(scores: list[Tensor], sparsity: float) -> list[Tensor]:
    """Masks of the highest scores over all tensors; ties go to the earlier value.

    Args:
        scores: Any shapes.
        sparsity: Share that is not kept, in [0, 1).

    Returns:
        Bool tensors of the same shapes; ``n - int(sparsity · n)`` values are True.
    """
    flat = torch.cat([score.flatten() for score in scores])
    count = len(flat) - int(sparsity * len(flat))
    keep = torch.zeros_like(flat, dtype=torch.bool)
    keep[flat.argsort(descending=True, stable=True)[:count]] = True
    parts = keep.split([score.numel() for score in scores])
    return [part.view(score.shape) for part, score in zip(parts, scores, strict=True)]
