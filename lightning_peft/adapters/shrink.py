"""Removing components for real: parameters, gradients and optimizer state get smaller together.

On one device the tensors shrink. Where an engine has buckets or shares of them (DDP, ZeRO, FSDP)
they keep their size: survivors move to the front, the rest is zeroed in parameter, gradient and
moments, and the layer computes with views of the front. What is saved is the front in every case.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_peft import distributed
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
    if not resize:
        distributed.rewrite(
            parameter, lambda t: _take(t, dim, indices.to(t.device), resize=False), optimizer
        )
        return
    shape, grad = parameter.shape, parameter.grad
    value = _take(parameter.detach(), dim, indices, resize)
    grad = None if grad is None else _take(grad, dim, indices, resize)
    replace_tensor(parameter, value, grad)
    _keep_state(parameter, shape, dim, indices, optimizer)


def _keep_state(
    parameter: nn.Parameter,
    shape: torch.Size,
    dim: int,
    indices: Tensor,
    optimizer: Optimizer | None,
) -> None:
    """Treat every moment like the parameter, which had another shape when they were made."""
    if optimizer is not None:
        for key, value in moments(parameter, optimizer, shape).items():
            optimizer.state[parameter][key] = _take(value, dim, indices, resize=True)


def moments(
    parameter: nn.Parameter, optimizer: Optimizer, shape: torch.Size | None = None
) -> dict[str, Tensor]:
    """What an optimizer remembers of each value of a parameter.

    Args:
        parameter: The parameter.
        optimizer: The optimizer.
        shape: Of the parameter when it was last stepped; its own when None.

    Returns:
        Tensors of that shape by their name in the optimizer's state.

    Raises:
        ValueError: If the optimizer packs values together (8-bit, factored): what it remembers of
            one cannot be taken out.
    """
    shape = parameter.shape if shape is None else shape
    state = optimizer.state.get(parameter, {})
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    found = {key: value for key, value in tensors.items() if value.shape == shape}
    packed = [key for key, value in tensors.items() if key not in found and value.numel() > 1]
    if packed:
        raise ValueError(
            f"{type(optimizer).__name__} keeps {packed[0]} in another shape than the parameter, so "
            "that single components or values cannot be taken out of it; give an optimizer with "
            "plain moments, such as torch.optim.AdamW."
        )
    return found


def keep_components(
    layer: LoRALinear,
    indices: Tensor,
    optimizer: Optimizer | None = None,
    resize: bool | None = None,
) -> None:
    """Keep the components at ``indices`` of a layer and remove the others.

    Args:
        layer: The layer. Its function without the removed components stays what it was, to
            rounding.
        indices: Of the survivors, increasing, (k,), int64; k = 0 leaves a layer that equals its
            base.
        optimizer: Whose moments follow. Without it a running optimizer's state is left as it was.
        resize: Whether tensors shrink or keep their size with the survivors in front; None for
            what the engine allows: they shrink on one device only.

    Raises:
        ValueError: If the optimizer packs its state (:func:`moments`).
    """
    if resize is None:
        resize = all(distributed.resizable(parameter) for parameter, _ in layer.components())
    if optimizer is not None:
        for parameter, _ in layer.components():
            moments(parameter, optimizer)  # refuses before anything is changed
    for parameter, dim in layer.components():
        _keep_slices(parameter, dim, indices.to(parameter.device), optimizer, resize)
    if layer.gate is not None:
        _keep_in_gate(layer, indices, optimizer, resize)
    layer.rank = len(indices)


def _keep_in_gate(
    layer: LoRALinear, indices: Tensor, optimizer: Optimizer | None, resize: bool
) -> None:
    """Take what a gate holds for each component, tensors of shape (r,), like A and B.

    Where a parameter has to keep its size the gate computes with its front
    (``values[: z.shape[-1]]``). Buffers belong to no engine and shrink everywhere.
    """
    gate = layer.gate
    assert gate is not None
    r = layer.rank
    held = [*gate.named_parameters(), *gate.named_buffers()]
    for name, tensor in held:
        if tensor.dim() > 1 and r in tensor.shape:
            raise ValueError(
                f"{type(gate).__name__}.{name} has shape {tuple(tensor.shape)} at rank {r}: what a "
                "gate holds for each component must have shape (r,) for components to be removed."
            )
    for name, tensor in held:
        if isinstance(tensor, nn.Parameter):
            if distributed.shape(tensor) == (r if resize else layer.r,):
                _keep_slices(tensor, 0, indices.to(tensor.device), optimizer, resize)
        elif tensor.shape == (r,):
            owner, _, leaf = name.rpartition(".")
            setattr(gate.get_submodule(owner), leaf, tensor[indices.to(tensor.device)])


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
        shape = [*distributed.shape(parameter)]  # where sizes are kept there is room already
        if shape and shape[dim] == layer.rank:
            shape[dim] = rank
            replace_tensor(parameter, parameter.detach().new_zeros(shape))
    if layer.gate is not None:
        for name, buffer in layer.gate.named_buffers():
            if buffer.shape == (layer.rank,):
                owner, _, leaf = name.rpartition(".")
                setattr(layer.gate.get_submodule(owner), leaf, buffer.new_zeros(rank))
    layer.rank = rank


def living_part(layers: Iterable[LoRALinear]) -> dict[int, tuple[int, int]]:
    """Which parameters hold dead components behind the living ones.

    Args:
        layers: The layers.

    Returns:
        By parameter id the dimension of its components, and how many of them live.
    """
    found = {}
    for layer in layers:
        gate = [] if layer.gate is None else [(p, 0) for p in layer.gate.parameters()]
        for parameter, dim in [*layer.components(), *gate]:
            shape = distributed.shape(parameter)
            of_components = dim < len(shape) and shape[dim] == layer.r
            if of_components and layer.rank < layer.r:
                found[id(parameter)] = (dim, layer.rank)
    return found
