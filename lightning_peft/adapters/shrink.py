"""Removing components for real: parameters, gradients and optimizer state get smaller together.

On one device the tensors shrink. Where an engine has buckets or shares of them (DDP, ZeRO, FSDP)
they keep their size: survivors move to the front, the rest is zeroed in parameter, gradient and
moments, and the layer computes with views of the front. What is saved is the front in every case.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_peft import distributed
from lightning_peft.adapters.adapted import AdaptedLayer
from lightning_peft.errors import UserError


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
            "a rank cannot change while something else holds on to the parameters: a "
            "graph that is still to be used (retain_graph=True, a forward without its backward "
            f"pass), a view or a weak reference ({error})."
        ) from error
    parameter.grad = grad


def keep_slices(
    parameter: nn.Parameter,
    dim: int,
    indices: Tensor,
    optimizer: Optimizer | None = None,
    resize: bool = True,
) -> None:
    """Keep slices of a parameter, its gradient and its moments.

    Args:
        parameter: It stays the same object.
        dim: Of the slices.
        indices: Of those that stay, (k,), on the parameter's device.
        optimizer: Whose moments follow.
        resize: Whether the tensors shrink, or keep their size with the survivors in front.
    """
    if not resize:
        distributed.rewrite(
            parameter, lambda t: _take(t, dim, indices.to(t.device), resize=False), optimizer
        )
        return
    grad = parameter.grad
    moments = {} if optimizer is None else distributed.moments(parameter, optimizer)
    value = _take(parameter.detach(), dim, indices, resize)
    grad = None if grad is None else _take(grad, dim, indices, resize)
    replace_tensor(parameter, value, grad)
    for key, moment in moments.items():
        assert optimizer is not None
        optimizer.state[parameter][key] = _take(moment, dim, indices, resize)


def keep_components(
    layer: AdaptedLayer,
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
        UserError: If the layer has no ranks, or the optimizer packs its state
            (:func:`lightning_peft.distributed.moments`).
    """
    refuse_change(layer, "removed")
    if indices.dtype != torch.int64:
        raise UserError(f"the components to keep are given by index, int64, not {indices.dtype}.")
    if resize is None:
        resize = all(distributed.resizable(parameter) for parameter, _ in layer.components())
    if optimizer is not None and resize:
        for parameter, _ in layer.components():
            distributed.moments(parameter, optimizer)  # refuses before anything is changed
    gate = list(gate_tensors(layer))  # told by their shape, which changes below
    for parameter, dim in layer.components():
        keep_slices(parameter, dim, indices.to(parameter.device), optimizer, resize)
    for owner, leaf, tensor in gate:
        own = indices.to(tensor.device)
        if isinstance(tensor, nn.Parameter):
            keep_slices(tensor, 0, own, optimizer, resize)
        else:
            setattr(owner, leaf, tensor[own])
    layer.rank = len(indices)


def refuse_change(layer: AdaptedLayer, change: str) -> None:
    """Refuse a layer whose components cannot be removed or added, or not alone.

    Args:
        layer: The layer.
        change: ``removed`` or ``added``.

    Raises:
        UserError: As said.
    """
    if layer.rank is None or not layer.components():
        raise UserError(f"a {type(layer).__name__} has no components that could be {change}.")
    if layer.shares:
        raise UserError(
            f"components cannot be {change} in a layer that shares them with another one."
        )


def width(layer: AdaptedLayer) -> int:
    """How many components a layer's parameters hold, living ones and what is dead behind them."""
    parameter, dim = layer.components()[0]
    return distributed.shape(parameter)[dim]


def gate_tensors(layer: AdaptedLayer) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """What a layer's gate holds for each component: tensors of shape (r,).

    Where a parameter has to keep its size the gate computes with its front
    (``values[: z.shape[-1]]``). Buffers belong to no engine and are resized everywhere.

    Args:
        layer: The layer.

    Yields:
        The module that holds one, its name there, and the tensor.

    Raises:
        UserError: If one has another shape that holds the rank.
    """
    gate, rank = layer.gate, layer.rank
    if gate is None or rank is None:
        return
    wide = width(layer)
    for path, owner in gate.named_modules():
        parameters = owner.named_parameters(recurse=False)
        for leaf, tensor in (*parameters, *owner.named_buffers(recurse=False)):
            size = wide if isinstance(tensor, nn.Parameter) else rank
            if tensor.dim() > 1 and rank in tensor.shape:
                name = f"{path}.{leaf}".lstrip(".")
                raise UserError(
                    f"{type(gate).__name__}.{name} has shape {tuple(tensor.shape)} at rank {rank}: "
                    "what a gate holds for each component must have shape (r,) for components to "
                    "be removed or added."
                )
            if distributed.shape(tensor) == (size,):  # type: ignore[arg-type]
                yield owner, leaf, tensor


def check_gates(layers: Iterable[AdaptedLayer]) -> None:
    """Refuse gates that would fail at the first removal, before training.

    A copy of each gate loses one component, as a removal would take it, and is called in training
    and in eval. The random stream stays where it was.

    Args:
        layers: Freshly attached layers.

    Raises:
        UserError: If a gate fails, or gives another number of components than it is given.
    """
    gated = [(layer.gate, layer.rank, _like(layer)) for layer in layers if layer.gate is not None]
    devices = {like.device.index for _, _, like in gated if like.is_cuda}
    with torch.random.fork_rng(devices=sorted(devices)):
        for gate, rank, like in gated:
            if (rank or 0) > 1 and not like.is_meta:
                _check_gate(gate, rank or 0, like)


def _like(layer: AdaptedLayer) -> Tensor:
    """A parameter of the layer's own, for its dtype and device."""
    return next(layer.own_parameters()).detach()


@torch.no_grad()
def _check_gate(gate: nn.Module, rank: int, like: Tensor) -> None:
    resize = all(distributed.resizable(p) for p in gate.parameters())
    trial = copy.deepcopy(gate)
    held = [*trial.named_parameters(), *trial.named_buffers()]
    for name, tensor in held:
        if tensor.shape == (rank,) and (resize or not isinstance(tensor, nn.Parameter)):
            owner, _, leaf = name.rpartition(".")
            front = tensor[:-1].clone()
            kept = nn.Parameter(front) if isinstance(tensor, nn.Parameter) else front
            setattr(trial.get_submodule(owner), leaf, kept)
    z = like.new_ones(2, rank - 1)
    failure = ""
    for training in (True, False):
        try:
            found = trial.train(training)(z)
            if found.shape != z.shape:
                failure = f"gives {tuple(found.shape)} for {tuple(z.shape)}"
        except (RuntimeError, ValueError, IndexError) as error:
            failure = " ".join(str(error).split()).split(". ")[0].rstrip(".")
    wide = next((n for n, t in held if t.dim() > 1 and rank in t.shape), None)
    if wide is not None:
        failure = f"{wide} holds components in another shape than (r,)"
    if failure:
        use = "hold it in a parameter or buffer of shape (r,)"
        if not resize:
            use = (
                "with several processes parameters keep their size, so compute with the front, "
                "values[: z.shape[-1]], of one of shape (r,), or run on one device"
            )
        raise UserError(
            f"the rank_gate {type(gate).__name__} cannot lose components, which this method "
            f"removes ({failure}): {use}."
        )


def living_part(layers: Iterable[AdaptedLayer]) -> dict[int, tuple[int, int]]:
    """Which parameters hold dead components behind the living ones.

    Args:
        layers: The layers.

    Returns:
        By parameter id the dimension of its components, and how many of them live.
    """
    found = {}
    for layer in layers:
        components = layer.components()
        if components and width(layer) > (layer.rank or 0):
            gate = [(t, 0) for _, _, t in gate_tensors(layer) if isinstance(t, nn.Parameter)]
            for parameter, dim in [*components, *gate]:
                found[id(parameter)] = (dim, layer.rank or 0)
    return found
