"""One device and DDP: every process has everything where PyTorch has it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lightning_peft.distributed.keeper import Keeper
from lightning_peft.errors import UserError


class Whole(Keeper):
    """The keeper of parameters that no engine has changed, and what torch's own engines share.

    A share is all of it here.
    """

    plain = True

    @staticmethod
    def keeps(parameter: nn.Parameter) -> bool:
        """Any parameter, so that this keeper is to be asked last."""
        return True

    def value(self) -> Tensor:
        """The value itself, not a copy."""
        return self.read_share(self.parameter.detach())

    def write(self, full: Tensor) -> None:
        """Set the value; a graph that is alive does not notice."""
        self.write_share(self.parameter.data, full)

    def gradient(self) -> Tensor | None:
        """The gradient itself, not a copy."""
        return None if self.parameter.grad is None else self.read_share(self.parameter.grad)

    def write_gradient(self, full: Tensor) -> None:
        """Set the gradient in its place."""
        self.write_share(self.parameter.grad, full)

    def stepped(self) -> Tensor:
        """The parameter."""
        return self.parameter

    def holder(self, optimizer: Any) -> Any:
        """The optimizer."""
        return optimizer

    def moments(self, optimizer: Any) -> dict[str, Tensor]:
        """The entries of the parameter's shape, themselves and not copies."""
        state = self.state(optimizer)
        return {key: self.read_share(state[key]) for key in self.moment_keys(optimizer)}

    def write_moment(self, optimizer: Any, key: str, full: Tensor) -> None:
        """Set a moment in its place."""
        self.begin_moment(optimizer, key, full.dtype)
        self.write_share(self.state(optimizer)[key], full)

    def moment_keys(self, optimizer: Any) -> list[str]:
        """Of the entries of the parameter's shape, if there are no others but counters."""
        tensors = {k: v for k, v in self.state(optimizer).items() if isinstance(v, Tensor)}
        found = [k for k, v in tensors.items() if v.shape == self.parameter.shape]
        packed = next((k for k, v in tensors.items() if k not in found and v.numel() > 1), None)
        if packed is not None:
            raise UserError(
                f"{type(optimizer).__name__} keeps {packed} in another shape than the parameter, "
                "so that single components or values cannot be taken out of it; give an optimizer "
                "with plain moments, such as torch.optim.AdamW."
            )
        return found

    def read_share(self, share: Tensor) -> Tensor:
        """In full what this process has a share of: the tensor itself."""
        return share

    def write_share(self, share: Tensor, full: Tensor) -> None:
        """Set a share from what it is a share of."""
        share.copy_(full)
