"""Removing rows and columns of a weight for real, with all that stands beside them.

The base's weight, its bias, the adapter, gradients and optimizer state get smaller together: the
counterpart of :mod:`.shrink`, which removes what lies on the rank's dimension. On one device only.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_peft import distributed
from lightning_peft.adapters.adapted import AdaptedLayer
from lightning_peft.adapters.dense import is_quantized
from lightning_peft.adapters.shrink import keep_slices
from lightning_peft.errors import UserError


@torch.no_grad()
def keep_features(
    layer: nn.Module, dim: int, indices: Tensor, optimizer: Optimizer | None = None
) -> None:
    """Keep some rows or columns of a linear and of its adapter; parameter objects stay the same.

    What reads the rows, or made the inputs of the columns, has to follow: a group of
    :func:`lightning_peft.adapters.groups.groups_of` is what keeps a model whole.

    Args:
        layer: An adapted layer, or a plain linear.
        dim: 0 for rows (outputs), 1 for columns (inputs).
        indices: Of those that stay, increasing, (k,), int64.
        optimizer: Whose moments follow; without it a running one's do not fit any more.

    Raises:
        UserError: If the weight is quantized, the adapter's form does not say what it holds for
            each row and column, the optimizer packs its state, or an engine keeps sizes.
    """
    found = list(_along(layer, dim))
    for parameter, _ in found:
        if not distributed.resizable(parameter):
            raise UserError("rows and columns of a weight can leave on one device only.")
        if optimizer is not None:
            distributed.moments(parameter, optimizer)  # refuses before anything is changed
    for parameter, along in found:
        keep_slices(parameter, along, indices.to(parameter.device), optimizer)
    for holder in {layer, base_of(layer)}:
        setattr(holder, ("out_features", "in_features")[dim], len(indices))
    if isinstance(layer, AdaptedLayer):
        layer.resized = True


def base_of(layer: nn.Module) -> nn.Module:
    """The linear of an adapted layer; a plain linear itself."""
    return layer.base if isinstance(layer, AdaptedLayer) else layer


def _along(layer: nn.Module, dim: int) -> Iterator[tuple[nn.Parameter, int]]:
    """What a linear and its adapter hold for each row (0) or column (1), and along which dim."""
    base = base_of(layer)
    if is_quantized(base):
        raise UserError(f"rows and columns cannot leave a {type(base).__name__}.")
    yield base.weight, dim  # type: ignore[misc]
    if dim == 0 and base.bias is not None:
        yield base.bias, 0  # type: ignore[misc]
    if isinstance(layer, AdaptedLayer):
        yield from layer.features(dim)
