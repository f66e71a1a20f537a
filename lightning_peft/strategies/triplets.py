"""What methods share whose change is ``P Λ Q``: the penalty, and each component's importance.

AdaLoRA (Zhang et al. 2023, https://arxiv.org/abs/2303.10512) has both. Q is the layer's A, P its B,
and Λ the trained scale of its gate.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lightning_peft.adapters.attach import lora_layers
from lightning_peft.adapters.gates import rank_scale
from lightning_peft.adapters.layer import LoRALinear
from lightning_peft.pruning import sensitivity
from lightning_peft.pruning.orthogonality import orthogonality

# The dimension of components in Λ, P and Q.
DIMS = {"values": 0, "P": 1, "Q": 0}


def triplet(layer: LoRALinear) -> dict[str, nn.Parameter]:
    """Λ, P and Q of a layer, in the order of :data:`DIMS`."""
    (Q, _), (P, _) = layer.components()
    return {"values": rank_scale(layer.gate).values, "P": P, "Q": Q}


def orthogonality_penalty(model: nn.Module) -> Tensor | float:
    """Mean over all P and Q of ``‖PᵀP - I‖_F`` and ``‖QQᵀ - I‖_F`` (AdaLoRA's equation 4)."""
    layers = lora_layers(model).values()
    matrices = [m for layer in layers for m in (layer.active_A, layer.active_B.T)]
    return orthogonality(matrices) if matrices else 0.0


class TripletImportance(dict[str, dict[str, Tensor]]):
    """Smoothed sensitivity and its uncertainty of each value, by layer and matrix.

    Args:
        beta1: Smoothing of the sensitivity, in (0, 1).
        beta2: Smoothing of its uncertainty, in (0, 1).
    """

    def __init__(self, beta1: float, beta2: float) -> None:
        super().__init__()
        self.beta1, self.beta2 = beta1, beta2

    def update(self, layers: Mapping[str, LoRALinear]) -> Tensor:  # type: ignore[override]
        """Take in a step's values and gradients (equations 8 and 9).

        Args:
            layers: By name.

        Returns:
            Whether it was done, a bool on the device: not where gradients are not finite, as in a
            step that a gradient scaler skips, which is no ground to decide on.
        """
        living = {name: _living(layer) for name, layer in layers.items()}
        grads = [grad for parts in living.values() for _, grad in parts.values()]
        finite = nn.utils.get_total_norm(grads).isfinite()  # not read here: that would wait
        for name, parts in living.items():
            averages = self.setdefault(name, {})
            for key, (value, grad) in parts.items():
                zero = torch.zeros_like(value)
                average, uncertainty = (  # from a checkpoint they come on the CPU
                    averages.get(f"{key}.{kind}", zero).to(value.device)
                    for kind in ("average", "uncertainty")
                )
                before = average, uncertainty
                found = sensitivity.smooth((value * grad).abs(), *before, self.beta1, self.beta2)
                for kind, new, old in zip(("average", "uncertainty"), found, before, strict=True):
                    averages[f"{key}.{kind}"] = torch.where(finite.to(new.device), new, old)
        return finite

    def score(self, name: str) -> Tensor:
        """Importance of each component of a layer, (rank,) (equation 7)."""
        parts = self[name]
        products = (parts[f"{key}.average"] * parts[f"{key}.uncertainty"] for key in DIMS)
        return sensitivity.triplet_score(*products)

    def keep(self, name: str, kept: Tensor) -> None:
        """Follow a layer that keeps the components at these indices."""
        for key, held in self[name].items():
            dim = DIMS[key.partition(".")[0]]
            self[name][key] = held.index_select(dim, kept.to(held.device))

    def add(self, name: str) -> None:
        """Follow a layer that gets one more component, of which nothing is known yet."""
        for key, held in self[name].items():
            shape = [*held.shape]
            shape[dim := DIMS[key.partition(".")[0]]] = 1
            self[name][key] = torch.cat([held, held.new_zeros(shape)], dim)

    def state(self) -> dict[str, dict[str, Tensor]]:
        """What a checkpoint keeps."""
        return {name: dict(parts) for name, parts in self.items()}

    def restore(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take back what :meth:`state` gave."""
        self.clear()
        for name, parts in state.items():
            self[name] = dict(parts)


def _living(layer: LoRALinear) -> dict[str, tuple[Tensor, Tensor]]:
    """Value and gradient of what lives of Λ, P and Q."""
    found = {}
    for key, parameter in triplet(layer).items():
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        dim, rank = DIMS[key], layer.rank
        found[key] = parameter.detach().narrow(dim, 0, rank), grad.narrow(dim, 0, rank)
    return found
