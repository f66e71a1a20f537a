"""Removing components for real: parameters, gradients and optimizer state get smaller together.

On one device the tensors shrink. Where an engine has flattened or sharded them (DDP, ZeRO, FSDP)
they keep their size: survivors move to the front, the rest is zeroed in parameter, gradient and
moments, and the layer computes with views of the front.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_peft.adapters.gates import keep_in_gate
from lightning_peft.adapters.layer import LoRALinear


def _take(tensor: Tensor, dim: int, indices: Tensor, resize: bool) -> Tensor:
    """The slices at ``indices``, in front of zeros where the size has to stay."""
    kept = tensor.index_select(dim, indices).contiguous()
    if resize:
        return kept
    front = torch.zeros_like(tensor)
    front.narrow(dim, 0, len(indices)).copy_(kept)
    return front


def replace_tensor(parameter: nn.Parameter, value: Tensor, grad: Tensor | None = None) -> None:
    """Give a parameter another tensor, of any shape, and keep the object that everybody refers to.

    ``parameter.data = value`` would do, but for a graph that is still alive (a loss that a loop
    holds on to): it owns the node that accumulates gradients, and that node expects the old shape.
    """
    fresh = nn.Parameter(value, parameter.requires_grad)
    parameter.grad = None
    try:
        torch.utils.swap_tensors(parameter, fresh)
    except RuntimeError as error:
        raise RuntimeError(
            "components cannot be removed while something else holds on to their parameter: a "
            "graph that is still to be used (retain_graph=True, a forward without its backward "
            f"pass), a view or a weak reference ({error})."
        ) from error
    parameter.grad = grad


def _keep_slices(
    parameter: nn.Parameter, dim: int, indices: Tensor, optimizer: Optimizer | None, resize: bool
) -> None:
    shape, grad = parameter.shape, parameter.grad
    value = _take(parameter.detach(), dim, indices, resize)
    grad = None if grad is None else _take(grad, dim, indices, resize)
    if resize:
        replace_tensor(parameter, value, grad)
    else:
        parameter.data.copy_(value)
        parameter.grad = grad
    _keep_state(parameter, shape, dim, indices, optimizer, resize)


def _keep_state(
    parameter: nn.Parameter,
    shape: torch.Size,
    dim: int,
    indices: Tensor,
    optimizer: Optimizer | None,
    resize: bool = True,
) -> None:
    """Treat every tensor of the optimizer's state that has the parameter's old shape like it."""
    if optimizer is None or parameter not in optimizer.state:
        return
    state = optimizer.state[parameter]
    for key, value in state.items():
        if isinstance(value, Tensor) and value.shape == shape:
            state[key] = _take(value, dim, indices, resize)


def keep_components(
    layer: LoRALinear, indices: Tensor, optimizer: Optimizer | None = None, resize: bool = True
) -> None:
    """Keep the components at ``indices`` of a layer and remove the others.

    Args:
        layer: The layer. Its function without the removed components stays what it was, to
            rounding.
        indices: Of the survivors, increasing, (k,), int64; k = 0 leaves a layer that equals its
            base.
        optimizer: Whose moments follow. Without it a running optimizer's state is left as it was.
        resize: Whether tensors shrink (one device) or keep their size with the survivors in front.
    """
    for parameter, dim in layer.components():
        _keep_slices(parameter, dim, indices.to(parameter.device), optimizer, resize)
    if layer.gate is not None:
        shapes = {p: p.shape for p in layer.gate.parameters()}
        keep_in_gate(layer.gate, indices, layer.rank)
        for parameter, shape in shapes.items():
            if parameter.shape != shape:
                _keep_state(parameter, shape, 0, indices.to(parameter.device), optimizer)
    layer.rank = len(indices)


def match_ranks(layers: Iterable[tuple[LoRALinear, int]]) -> None:
    """Give layers the ranks that a saved state has, before that state is loaded.

    Args:
        layers: Each layer with its saved rank, at most the present one.

    Raises:
        ValueError: If a saved rank is above the layer's.
    """
    for layer, rank in layers:
        if rank > layer.rank:
            raise ValueError(f"a saved rank of {rank} does not fit a layer of rank {layer.rank}.")
        if rank < layer.rank:
            keep_components(layer, torch.arange(rank))
