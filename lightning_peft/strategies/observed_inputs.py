"""What enters each layer over a sample, for methods that look at the data first."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft import distributed
from lightning_peft.adapters.adapted import AdaptedLayer
from lightning_peft.adapters.attach import adapter_layers
from lightning_peft.adapters.observe import observe_inputs
from lightning_peft.pruning.covariance import Moments, moments, together
from lightning_peft.strategies.base import Loss
from lightning_peft.strategies.observed_gradients import refuse_unseen


@torch.no_grad()
def scatters(
    model: nn.Module, batches: Iterator[Any], loss: Loss
) -> Iterator[tuple[str, AdaptedLayer, Tensor]]:
    """The scatter of each adapted layer's inputs at attended tokens, in eval, on all processes.

    Args:
        model: The adapted model; in eval from now on.
        batches: As many on each process; None where one has run out of its own.
        loss: Runs the model on a batch.

    Yields:
        A layer's name, the layer, and ``Σ (x - μ)(x - μ)ᵀ`` (d_in, d_in), 4 bytes a value, on the
        host; zero for a layer that nothing entered. It may be forgotten before the next one.

    Raises:
        UserError: If no process has seen a layer.
    """
    sums: dict[str, Moments] = {}

    def add(name: str, layer: AdaptedLayer, x: Tensor) -> None:
        if len(x):
            own = Moments(*(value.cpu() for value in moments(x)))
            sums[name] = together(sums[name], own) if name in sums else own

    model.eval()
    with observe_inputs(model, add):
        for batch in batches:
            loss(batch)
    refuse_unseen(bool(sums))
    for name, layer in adapter_layers(model).items():
        yield name, layer, _everywhere(sums.pop(name, None), layer.in_features)


def _everywhere(own: Moments | None, d: int) -> Tensor:
    """The scatter about the common mean of what all processes have seen, (d, d)."""
    if own is None:  # an idle expert, or a process without a batch
        own = Moments(torch.zeros((), dtype=torch.float64), torch.zeros(d), torch.zeros(d, d))
    count, mean, scatter = own
    mean = mean.double()
    (total,) = distributed.total([count])
    (common,) = distributed.total([mean * count])
    gap = mean - common / total.clamp_min(1)
    (scatter,) = distributed.total([scatter + (count * torch.outer(gap, gap)).to(scatter.dtype)])
    return scatter
