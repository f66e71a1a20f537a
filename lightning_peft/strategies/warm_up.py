"""A learning rate of their own for components that begin while a model trains.

A parameter has one learning rate for all that it holds. The updates of SGD and of Adam's kind are
proportional to it, so part of an update is taken back after the step instead:
``p ← p_before + f · (p_after - p_before)`` is a step at f times the learning rate.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_peft import distributed

Born = dict[str, dict[int, int]]


class Held(NamedTuple):
    """Slices of a parameter before a step."""

    parameter: nn.Parameter
    dim: int
    indices: Tensor
    factors: Tensor
    before: Tensor


class WarmUp:
    """Lets the learning rate of new components rise from zero.

    Components are known by the key of a parameter and their index in it.

    Args:
        steps: Optimizer steps until the learning rate is the parameter's.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps
        # By parameter and component the step at which it began; none whose warm-up is over.
        self.born: Born = {}
        self._held: list[Held] = []

    def begin(self, key: str, first: int, end: int, step: int) -> None:
        """Note that the components from ``first`` to ``end - 1`` of a parameter begin at a step."""
        if self.steps:
            self.born.setdefault(key, {}).update(dict.fromkeys(range(first, end), step))

    def factor(self, born: int, step: int) -> float:
        """Of the learning rate at a step: 0 at the next after the first, then rising evenly."""
        return min(max(step - born - 1, 0) / self.steps, 1.0)

    @torch.no_grad()
    def before(self, key: str, parameter: nn.Parameter, dim: int, rank: int, step: int) -> None:
        """Hold on to a parameter's new components before the optimizer's step.

        Args:
            key: Of the parameter.
            parameter: Of any engine that keeps weights whole.
            dim: Of its components.
            rank: How many there are; those behind have gone.
            step: Optimizer step, 0-based.
        """
        born = {
            index: began
            for index, began in self.born.pop(key, {}).items()
            if index < rank and self.factor(began, step) < 1
        }
        if born:
            self.born[key] = born
            full = distributed.value(parameter)
            indices = torch.tensor(list(born), device=full.device)
            shape = [1] * full.dim()
            shape[dim] = -1
            factors = torch.tensor([self.factor(began, step) for began in born.values()])
            before = full.index_select(dim, indices)
            self._held.append(Held(parameter, dim, indices, factors.to(full).view(shape), before))

    @torch.no_grad()
    def after(self) -> None:
        """Take back a part of what the optimizer's step has changed."""
        for parameter, dim, indices, factors, before in self._held:
            full = distributed.value(parameter).clone()
            change = full.index_select(dim, indices) - before
            distributed.write(parameter, full.index_copy_(dim, indices, before + factors * change))
        self._held = []
