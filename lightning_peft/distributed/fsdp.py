"""FSDP2: parameter, gradient and moments are cut along their first dimension, as DTensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from lightning_peft.distributed.whole import Whole


def whole(tensor: Tensor) -> Tensor:
    """A tensor in full, made of what processes have of it where it is cut as parameters are."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class Fsdp(Whole):
    """They are where PyTorch has them, but each process holds a share."""

    plain = False
    is_cut = True

    @staticmethod
    def keeps(parameter: nn.Parameter) -> bool:
        """Whether it is a DTensor."""
        return isinstance(parameter, DTensor)

    @staticmethod
    @contextmanager
    def gathered(model: nn.Module, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
        """Have the root's group whole, in which the adapters are."""
        root: Any = model
        root.unshard()
        try:
            yield
        finally:
            root.reshard()

    def read_share(self, share: Tensor) -> Tensor:
        """In full; what an optimizer keeps whole is taken as it is."""
        return whole(share)

    def write_share(self, share: Tensor, full: Tensor) -> None:
        """Take this process' rows; nothing is sent."""
        if not isinstance(share, DTensor):
            share.copy_(full)
            return
        full = full.to(share.device, share.dtype)
        mine = distribute_tensor(full, share.device_mesh, share.placements, src_data_rank=None)
        share.to_local().copy_(mine.to_local())
