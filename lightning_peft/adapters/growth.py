"""Adding components while a model trains, the counterpart of :mod:`.shrink`.

On one device tensors get larger. Where an engine has buckets or shares of them (DDP, ZeRO, FSDP)
they cannot: there a layer is made with room for ``max_r`` components, and new ones are written into
the room behind the living.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_peft import distributed
from lightning_peft.adapters.adapted import AdaptedLayer
from lightning_peft.adapters.gates import RankScale
from lightning_peft.adapters.shrink import (
    gate_tensors,
    keep_components,
    refuse_change,
    replace_tensor,
    width,
)
from lightning_peft.errors import UserError

Moments = Mapping[str, tuple[Tensor, Tensor]]


@torch.no_grad()
def add_components(
    layer: AdaptedLayer,
    A_new: Tensor,
    B_new: Tensor,
    optimizer: Optimizer | None = None,
    moments: Moments | None = None,
    gate: float = 1.0,
    resize: bool | None = None,
) -> None:
    """Add components behind those that a layer has; parameter objects stay the same ones.

    The layer's function changes by ``s · B_new A_new x``: with one of the two zero it stays what it
    was. Gradients of the new components are zero, as are their moments unless they are given; Adam
    steps up to 3.2 learning rates at first, since its step counter is the whole parameter's.

    Args:
        layer: A layer of two factors, A (r, d_in) and B (d_out, r).
        A_new: New rows of A, (k, d_in).
        B_new: New columns of B, (d_out, k).
        optimizer: Whose moments follow; without it a running one's do not fit any more.
        moments: By the optimizer's key (``exp_avg``), what it is to remember of the new rows and
            columns, in the shapes of ``A_new`` and ``B_new``.
        gate: What the gate's trained scale holds for each; other gates in a chain begin with 1.
        resize: Whether tensors get larger, and not room is filled; None for what the engine allows.

    Raises:
        UserError: If shapes do not fit, the layer would have more than ``max_r`` components or has
            no two factors, values are not finite, or the optimizer packs its state.
    """
    A_new, B_new = distributed.whole(A_new), distributed.whole(B_new)
    _check(layer, A_new, B_new)
    rank, count = layer.rank or 0, len(A_new)
    if resize is None:
        resize = all(distributed.resizable(parameter) for parameter, _ in layer.components())
    if not resize:
        _check_room(layer, count)
    given = dict(moments or {})
    if optimizer is not None:
        _check_moments(layer, optimizer, given, count)  # refuses before anything is changed
    held = list(_in_gate(layer, gate, count))  # told by their shape, which changes below
    for index, (parameter, dim) in enumerate(layer.components()):
        own = {key: pair[index] for key, pair in given.items()}
        _extend(parameter, dim, rank, (A_new, B_new)[index], own, optimizer, resize)
    for owner, leaf, tensor, values in held:
        if isinstance(tensor, nn.Parameter):
            _extend(tensor, 0, rank, values, {}, optimizer, resize)
        else:
            setattr(owner, leaf, torch.cat([tensor, values]))
    layer.rank = rank + count


def _in_gate(
    layer: AdaptedLayer, first: float, count: int
) -> Iterator[tuple[nn.Module, str, Tensor, Tensor]]:
    """What a gate holds for each component: its owner, name, values, and those of new ones."""
    held = list(gate_tensors(layer))
    own = next((owner for owner, _, _ in held if isinstance(owner, RankScale)), None)
    for owner, leaf, tensor in held:
        begin = first if own in (None, owner) else 1.0
        values = torch.full((count,), begin, device=tensor.device)
        yield owner, leaf, tensor, values.to(tensor.dtype)


def most(layer: AdaptedLayer) -> int:
    """How many components a layer may have."""
    return layer.max_r or layer.r or 0


def _check(layer: AdaptedLayer, A_new: Tensor, B_new: Tensor) -> None:
    refuse_change(layer, "added")
    assert layer.rank is not None
    if len(layer.components()) != 2:
        raise UserError(
            f"a {type(layer).__name__} has no two factors that components are added to."
        )
    count = len(A_new)
    shapes = (count, layer.in_features), (layer.out_features, count)
    if (A_new.shape, B_new.shape) != shapes:
        raise UserError(
            f"A_new {tuple(A_new.shape)} and B_new {tuple(B_new.shape)} must be (k, "
            f"{layer.in_features}) and ({layer.out_features}, k)."
        )
    if layer.rank + count > most(layer):
        raise UserError(
            f"{count} more components would give a layer of rank {layer.rank} more than its "
            f"max_r of {most(layer)}."
        )
    for (parameter, _), new in zip(layer.components(), (A_new, B_new), strict=True):
        if not new.is_meta and not new.to(parameter.dtype).isfinite().all():
            raise UserError("new components hold NaN or infinite values.")


def _check_room(layer: AdaptedLayer, count: int) -> None:
    rank, room = layer.rank or 0, width(layer)
    if rank + count > room:
        raise UserError(
            f"a layer of rank {rank} has room for {room - rank} more components, not for "
            f"{count}: an engine of several processes keeps sizes, so make the layer with "
            f"max_r={rank + count} or more."
        )


def _check_moments(layer: AdaptedLayer, optimizer: Optimizer, given: Moments, count: int) -> None:
    for index, (parameter, dim) in enumerate(layer.components()):
        keys = distributed.moments(parameter, optimizer).keys()
        unknown = sorted(given.keys() - keys)
        if unknown:
            known = ", ".join(keys) or "nothing yet"
            name = type(optimizer).__name__
            raise UserError(f"moments: {name} remembers {known}, not {unknown[0]!r}.")
        shape = [*distributed.shape(parameter)]
        shape[dim] = count
        for key, pair in given.items():
            if [*pair[index].shape] != shape or not pair[index].isfinite().all():
                raise UserError(
                    f"moments: {key} must be finite and of the shapes of A_new and B_new."
                )


def _extend(
    parameter: nn.Parameter,
    dim: int,
    rank: int,
    new: Tensor,
    moments: Mapping[str, Tensor],
    optimizer: Optimizer | None,
    resize: bool,
) -> None:
    """Put slices behind the living ones of a parameter, its gradient and its moments."""

    def behind(full: Tensor, tail: Tensor) -> Tensor:
        tail = tail.to(full)
        if resize:
            return torch.cat([full.narrow(dim, 0, rank), tail], dim)
        wide = full.clone()
        wide.narrow(dim, rank, tail.shape[dim]).copy_(tail)
        return wide

    zero = torch.zeros_like(new)
    remembered = {} if optimizer is None else distributed.moments(parameter, optimizer)
    later = {key: behind(full, moments.get(key, zero)) for key, full in remembered.items()}
    if not resize:
        distributed.write(parameter, behind(distributed.value(parameter), new))
        for key, full in later.items():
            distributed.write_moment(parameter, optimizer, key, full)
        return
    grad = None if parameter.grad is None else behind(parameter.grad, zero)
    replace_tensor(parameter, behind(parameter.detach(), new), grad)
    for key, full in later.items():
        assert optimizer is not None
        optimizer.state[parameter][key] = full


def match_ranks(layers: Iterable[tuple[AdaptedLayer, int]]) -> None:
    """Give layers the ranks that a saved state has, before that state is loaded.

    A layer of fewer components gets zeros, for the load to fill.

    Args:
        layers: Each layer with its saved rank.

    Raises:
        UserError: If a saved rank is above what a layer may have.
    """
    for layer, rank in layers:
        present = layer.rank or 0
        if rank > most(layer):
            raise UserError(f"a saved rank of {rank} does not fit a layer of rank {most(layer)}.")
        if rank > present:
            _grow(layer, rank)
        elif rank < present:
            keep_components(layer, torch.arange(rank))


def _grow(layer: AdaptedLayer, rank: int) -> None:
    present, room = layer.rank or 0, width(layer)
    gate = list(gate_tensors(layer))
    parameters = [(t, 0) for _, _, t in gate if isinstance(t, nn.Parameter)]
    for parameter, dim in [*layer.components(), *parameters]:
        if room < rank:  # where sizes are kept there is room already
            shape = [*parameter.shape]
            shape[dim] = rank
            replace_tensor(parameter, parameter.detach().new_zeros(shape))
    for owner, leaf, tensor in gate:
        if not isinstance(tensor, nn.Parameter) and present != rank:
            setattr(owner, leaf, tensor.new_zeros(rank))
    layer.rank = rank
