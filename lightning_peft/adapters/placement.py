"""On which device adapters are made, where the base has no values yet."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

_place: ContextVar[torch.device | None] = ContextVar("place", default=None)


@contextmanager
def adapters_on(device: torch.device) -> Iterator[None]:
    """Make adapters of a base on the meta device on another, as if it were loaded there."""
    before = _place.set(device)
    try:
        yield
    finally:
        _place.reset(before)


def adapter_device(weight: Tensor) -> torch.device:
    """Where what stands beside a base's weight is made."""
    place = _place.get()
    return weight.device if place is None or not weight.is_meta else place
