"""How much each layer's adapter changes what the layer gives: mean ‖ΔW x‖² over tokens."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft import distributed
from lightning_peft.adapters.adapted import AdaptedLayer
from lightning_peft.adapters.attach import adapter_layers
from lightning_peft.adapters.observe import observe_inputs
from lightning_peft.errors import UserError


@torch.no_grad()
def measure_importance(
    model: nn.Module, batches: Iterable[Any], loss: Callable[[Any], Tensor]
) -> dict[str, float]:
    """Mean ‖ΔW x‖² of each adapted layer over the attended tokens of some batches, in eval.

    Args:
        model: The adapted model.
        batches: Batches.
        loss: Of one batch; called for its forward pass.

    Returns:
        By layer name, in the model's order; over the batches of all processes.

    Raises:
        UserError: If there are batches, and no forward pass of the model was seen.
    """
    sums: dict[str, Tensor] = {}
    tokens: dict[str, int] = defaultdict(int)

    def add(name: str, layer: AdaptedLayer, x: Tensor) -> None:
        total = layer.delta_sq_norm(x).double().sum()
        sums[name] = sums[name] + total if name in sums else total
        tokens[name] += len(x)

    was_training, given = model.training, 0
    model.eval()
    with observe_inputs(model, add):
        for batch in batches:
            loss(batch)
            given += 1
    model.train(was_training)
    if not any(distributed.everywhere(bool(sums) or not given)):
        raise UserError(
            "no forward pass of the adapted model was seen; attach the strategy to the module that "
            "the loss calls."
        )
    # A layer that no forward visits (an idle expert) matters nothing.
    layers = adapter_layers(model)
    device = next((total.device for total in sums.values()), torch.device("cpu"))
    zero = torch.zeros((), dtype=torch.float64, device=device)
    found = torch.stack([sums.get(name, zero) for name in layers])
    counts = torch.tensor([tokens[name] for name in layers], dtype=torch.float64, device=device)
    found, counts = distributed.total([found, counts])
    return dict(zip(layers, (found / counts.clamp_min(1)).tolist(), strict=True))
