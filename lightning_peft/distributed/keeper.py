"""What each engine must answer about a parameter that it keeps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn


class Keeper(ABC):
    """How an engine keeps one parameter, its gradient and what the optimizer remembers of it.

    What a method returns or is given is in full, in the parameter's shape, unless it is called a
    *share*: what this process holds of it. A method that returns something full is a collective.
    The methods are called without gradients, but for :meth:`gathered`.

    Args:
        parameter: One that this engine keeps (:meth:`keeps`).
    """

    plain = False
    """Whether all of it is where PyTorch has it, so that torch's own functions do."""
    is_cut = False
    """Whether this process holds a piece of its value only."""

    def __init__(self, parameter: nn.Parameter) -> None:
        self.parameter: Any = parameter

    @staticmethod
    @abstractmethod
    def keeps(parameter: nn.Parameter) -> bool:
        """Whether a parameter is kept in this way."""

    @staticmethod
    def groups(optimizer: Any) -> list[list[nn.Parameter]] | None:
        """The model's own parameters by group, where the engine gave the optimizer flat ones.

        None if this is no optimizer of the engine's, or one that has the model's own.
        """
        return None

    @staticmethod
    def gathered(
        model: nn.Module, parameters: Sequence[nn.Parameter]
    ) -> AbstractContextManager[Any]:
        """Have some parameters of this keeper's whole on all processes for a while, for reading."""
        return nullcontext()

    def shape(self) -> torch.Size:
        """The full shape."""
        return self.parameter.shape

    @abstractmethod
    def value(self) -> Tensor:
        """The value, detached."""

    @abstractmethod
    def write(self, full: Tensor) -> None:
        """Set the value, the engine's own copies of it included."""

    @abstractmethod
    def gradient(self) -> Tensor | None:
        """The gradient, averaged over processes; None where none came."""

    @abstractmethod
    def write_gradient(self, full: Tensor) -> None:
        """Set the gradient, which is there."""

    # What the optimizer remembers.

    @abstractmethod
    def stepped(self) -> Tensor:
        """What the optimizer steps in the parameter's place, by which it finds its state."""

    @abstractmethod
    def holder(self, optimizer: Any) -> Any:
        """The optimizer of torch's form that holds the state, in the one that the trainer has."""

    @abstractmethod
    def moment_keys(self, optimizer: Any) -> list[str]:
        """The keys of what the optimizer remembers of each value; none before the first step.

        No collective.

        Raises:
            UserError: If it packs values together, so that none can be taken out.
        """

    @abstractmethod
    def moments(self, optimizer: Any) -> dict[str, Tensor]:
        """What the optimizer remembers of each value, by the keys of :meth:`moment_keys`."""

    @abstractmethod
    def write_moment(self, optimizer: Any, key: str, full: Tensor) -> None:
        """Set a moment, which begins with this where there was none."""

    def state(self, optimizer: Any) -> dict[str, Any]:
        """The state of what is stepped, in shares, for reading; empty before the first step."""
        return self.holder(optimizer).state.get(self.stepped(), {})

    def begin_moment(self, optimizer: Any, key: str, dtype: torch.dtype) -> None:
        """Make room for a moment, unless it is there: zeros beside what is stepped."""
        stepped = self.stepped()
        state = self.holder(optimizer).state[stepped]
        if key not in state:
            state[key] = torch.zeros_like(stepped.detach(), dtype=dtype)

    def counters(self, optimizer: Any) -> dict[str, Any]:
        """The entries of the state that belong to no single value, such as the number of steps."""
        return {
            key: v
            for key, v in self.state(optimizer).items()
            if not isinstance(v, Tensor) or v.dim() == 0
        }

    def write_counter(self, optimizer: Any, key: str, value: Any) -> None:
        """Set such an entry where the optimizer has it: a fused one counts steps on the device."""
        stepped = self.stepped()
        if isinstance(value, Tensor):
            groups = optimizer.param_groups
            on_device = any(group.get("fused") or group.get("capturable") for group in groups)
            value = (
                value.to(stepped.device, torch.float32, copy=True) if on_device else value.clone()
            )
        self.holder(optimizer).state[stepped][key] = value
