"""What is measured of adapted layers while somebody else runs the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_peft import distributed
from lightning_peft.adapters.adapted import AdaptedLayer
from lightning_peft.adapters.attach import adapter_layers
from lightning_peft.adapters.observe import observe_inputs
from lightning_peft.strategies.base import AdapterStrategy


class Seen(NamedTuple):
    """What was seen of one layer.

    Attributes:
        total: Sum of ‖ΔWx‖² over tokens, or ‖ΔW‖_F of the weight itself, ().
        tokens: How many; 1 of a weight itself.
        rank: The layer's rank, or the highest that its change may have.
    """

    total: Tensor
    tokens: int
    rank: int


def rank_of(layer: AdaptedLayer) -> int:
    """A layer's rank; of a form without ranks the highest that its change may have."""
    return min(layer.in_features, layer.out_features) if layer.rank is None else layer.rank


class LayerWatch:
    """Sums ‖ΔWx‖² of each adapted layer over the forwards between ``start`` and ``stop``.

    Args:
        model: The adapted model.

    Attributes:
        model: The same.
        seen: By layer, in the order in which they ran.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.seen: dict[str, Seen] = {}
        self._inputs = observe_inputs(model, self._add)

    def start(self) -> None:
        """Begin to watch."""
        self._inputs.start()

    def stop(self) -> None:
        """Remove every hook."""
        self._inputs.stop()

    def _add(self, name: str, layer: AdaptedLayer, x: Tensor) -> None:
        # In the middle of a forward under autocast, which would compute this in half precision.
        with torch.autocast(x.device.type, enabled=False):
            total = layer.delta_sq_norm(x).float().sum()
        before = self.seen.get(name, (0, 0))
        self.seen[name] = Seen(total + before[0], before[1] + len(x), rank_of(layer))


def seen_by_all(model: nn.Module, seen: Mapping[str, Seen]) -> dict[str, Seen]:
    """What all processes have seen of the layers together.

    Args:
        model: The adapted model.
        seen: What this process has seen, by layer.

    Returns:
        The same, over all processes; layers that none has seen are left out.
    """
    if distributed.world_size() == 1:
        return dict(seen)
    layers = adapter_layers(model)
    device = next((found.total.device for found in seen.values()), torch.device("cpu"))
    zero = torch.zeros((), device=device)
    sums = torch.stack([seen[n].total.to(device) if n in seen else zero for n in layers]).double()
    counts = torch.tensor(
        [seen[n].tokens if n in seen else 0 for n in layers], device=device
    ).double()
    sums, counts = distributed.total([sums, counts])
    return {
        name: Seen(sums[i], int(counts[i]), rank_of(layer))
        for i, (name, layer) in enumerate(layers.items())
        if counts[i]
    }


def weight_changes(strategy: AdapterStrategy | None) -> dict[str, Seen]:
    """What a method without adapters has to show: the change itself, which may have any rank.

    Args:
        strategy: The run's, or None.

    Returns:
        By the weight's module; empty where there is nothing to show.
    """
    if strategy is None or strategy.model is None:
        return {}
    found = {}
    for name, change in strategy.weight_changes(strategy.model).items():
        weight: Tensor = strategy.model.get_submodule(name).weight  # type: ignore[assignment]
        found[name] = Seen(change, 1, min(weight.shape))
    return found
