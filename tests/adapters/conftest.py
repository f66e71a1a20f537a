"""What tests of several parts of an adapter build."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor, nn

from lightning_peft.adapters import LoRALinear


class Diagonal(nn.Module):
    """A fixed diagonal, with a value for each component."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.register_buffer("values", values)

    def keep(self, indices: Tensor) -> None:
        self.values = self.values[indices]

    def forward(self, z: Tensor) -> Tensor:
        return z * self.values.to(z.dtype)


@pytest.fixture
def diagonal() -> type[nn.Module]:
    """A gate that is a fixed diagonal: ``diagonal(values)``."""
    return Diagonal


@pytest.fixture
def filled() -> Callable[..., LoRALinear]:
    """Makes a layer whose B is not zero: ``filled(base, r, alpha, …)``."""

    def make(base: nn.Module, r: int = 3, alpha: float = 6.0, **more: Any) -> LoRALinear:
        layer = LoRALinear(base, r, alpha, **more)
        layer.reset_parameters(False)
        return layer

    return make
