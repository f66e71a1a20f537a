"""Removing components for real: parameters, gradients and optimizer state get smaller together.

On one device the tensors shrink. Where an engine has flattened or sharded them (DDP, ZeRO, FSDP)
they keep their size: survivors move to the front, the rest is zeroed in parameter, gradient and
moments, and the layer computes with views of the front.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

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
        if weakref.getweakrefs(parameter) and parameter._use_count() <= 2:  # type: ignore[attr-defined]
            # Guards of torch.compile, which swap_tensors refuses. They follow the object, whose new
            # shape makes them fail: what was compiled for the old one is then compiled anew.
            torch._C._swap_tensor_impl(parameter, fresh)  # type: ignore[attr-defined]
        else:
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
        _keep_in_gate(layer.gate, indices, layer.rank, optimizer)
    layer.rank = len(indices)


def _keep_in_gate(gate: nn.Module, indices: Tensor, r: int, optimizer: Optimizer | None) -> None:
    """Take what a gate holds for each component, tensors of shape (r,), like A and B."""
    held = [*gate.named_parameters(), *gate.named_buffers()]
    for name, tensor in held:
        if tensor.dim() > 1 and r in tensor.shape:
            raise ValueError(
                f"{type(gate).__name__}.{name} has shape {tuple(tensor.shape)} at rank {r}: what a "
                "gate holds for each component must have shape (r,) for components to be removed."
            )
    for name, tensor in held:
        if tensor.shape != (r,):
            continue
        at = indices.to(tensor.device)
        if isinstance(tensor, nn.Parameter):
            _keep_slices(tensor, 0, at, optimizer, resize=True)
        else:
            owner, _, leaf = name.rpartition(".")
            setattr(gate.get_submodule(owner), leaf, tensor[at])


def match_ranks(layers: Iterable[tuple[LoRALinear, int]]) -> None:
    """Give layers the ranks that a saved state has, before that state is loaded.

    A layer that has lost more components since gets them back, for the load to fill.

    Args:
        layers: Each layer with its saved rank.

    Raises:
        ValueError: If a saved rank is above the one that a layer began with.
    """
    for layer, rank in layers:
        if rank > layer.r:
            raise ValueError(f"a saved rank of {rank} does not fit a layer of rank {layer.r}.")
        if rank > layer.rank:
            _grow(layer, rank)
        elif rank < layer.rank:
            keep_components(layer, torch.arange(rank))


def _grow(layer: LoRALinear, rank: int) -> None:
    gate = [] if layer.gate is None else [(t, 0) for t in layer.gate.parameters()]
    for parameter, dim in [*layer.components(), *gate]:
        if parameter.shape[dim] == layer.rank:
            shape = [*parameter.shape]
            shape[dim] = rank
            replace_tensor(parameter, parameter.detach().new_zeros(shape))
    if layer.gate is not None:
        for name, buffer in layer.gate.named_buffers():
            if buffer.shape == (layer.rank,):
                owner, _, leaf = name.rpartition(".")
                setattr(layer.gate.get_submodule(owner), leaf, buffer.new_zeros(rank))
    layer.rank = rank
