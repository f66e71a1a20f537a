"""Refusing numbers that are none, before they are written or after they are read."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_peft.errors import UserError


def broken(tensor: Tensor) -> str | None:
    """What is no number in a tensor, ``NaN`` or ``an infinite value``; None where all are finite.

    Args:
        tensor: Of any dtype; what holds no floating-point values, or none yet (meta), is finite.
    """
    if tensor.is_meta or not (tensor.is_floating_point() or tensor.is_complex()):
        return None
    if bool(torch.isfinite(tensor).all()):
        return None
    return "NaN" if bool(torch.isnan(tensor).any()) else "an infinite value"


def refuse_broken(tensors: Mapping[str, Tensor], what: str) -> None:
    """Refuse to write numbers that are none.

    Args:
        tensors: By name.
        what: What is not written.

    Raises:
        UserError: Naming the first tensor that holds such a number.
    """
    for name, tensor in tensors.items():
        if found := broken(tensor.detach()):
            raise UserError(
                f"{name} holds {found}, so {what} is not written; take an earlier checkpoint, from "
                "before the training went wrong."
            )
