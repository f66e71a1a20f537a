"""What may stand between A and B.

A gate is any ``nn.Module`` that maps rank activations (..., r) to (..., r). Three promises make it
work with everything else:

* in eval it is a fixed diagonal, so that it folds into B (``nn.Dropout`` is one: the identity);
* it draws from torch's global random stream, which activation checkpointing and resume restore;
* where it holds a value for each component, that is a parameter or buffer of shape (r,), which
  loses the values of removed components together with A and B. Shape alone tells, so that a gate
  must hold nothing else in one dimension whose length the rank may have at some step.

:class:`Gate` is a base for those that do more: hold one draw over a whole optimizer step, or say
which components pass before they are computed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Gate(nn.Module):
    """A gate that may act at optimizer steps and choose components; any module can be one."""

    def choose(self, rank: int) -> tuple[Tensor, float] | None:
        """Say for one forward which components pass, so that the others are not even computed.

        Args:
            rank: How many components there are.

        Returns:
            The components (k,), int64, and the factor of all that pass; None to have ``forward``
            called instead, as where each token has a mask of its own.
        """
        return None

    def new_step(self) -> None:
        """Draw anew what holds for a whole optimizer step; called after each step."""

    def after_loading(self) -> None:
        """Take notice of the tensors that were loaded."""


def step_gates(gate: nn.Module | None) -> list[Any]:
    """The parts of a gate that act at optimizer steps."""
    parts = [] if gate is None else gate.modules()
    nothing = (None, Gate.new_step)
    return [part for part in parts if getattr(type(part), "new_step", None) not in nothing]


class RankScale(Gate):
    """A trained value for each component, in training and eval.

    Args:
        r: Rank.
        start: Value of all components before training.
    """

    def __init__(self, r: int, start: float) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.full((r,), start))

    def forward(self, z: Tensor) -> Tensor:
        """Scale rank activations, (..., r) to (..., r)."""
        return z * self.values[: z.shape[-1]].to(z.dtype)  # dead components may stand behind


def chosen_components(gate: nn.Module | None, rank: int) -> tuple[Tensor, float] | None:
    """Which components a gate lets through in this forward, (k,) int64, and their common factor.

    None where it does not say, or somebody watches its own forward, which then decides.

    Args:
        gate: The gate.
        rank: How many components there are.
    """
    choose = getattr(gate, "choose", None)
    if gate is None or choose is None or gate._forward_hooks or gate._forward_pre_hooks:
        return None
    return choose(rank)


def chain(first: nn.Module, then: nn.Module | None) -> nn.Module:
    """One gate after another; the first alone where there is no other."""
    return first if then is None else nn.Sequential(first, then)


def rank_scale(gate: nn.Module | None) -> RankScale:
    """The trained scale in a gate that has one."""
    assert gate is not None
    return next(part for part in gate.modules() if isinstance(part, RankScale))


def widen_gate(gate: nn.Module, r: int, width: int) -> None:
    """Give a gate's parameters of shape (r,) room for more components, which begin with 1.

    Args:
        gate: The gate, changed in place.
        r: Its rank.
        width: Values that they hold afterwards.
    """
    for owner in gate.modules():
        for leaf, parameter in owner.named_parameters(recurse=False):
            if parameter.shape == (r,):
                wide = torch.cat([parameter.detach(), parameter.new_ones(width - r)])
                setattr(owner, leaf, nn.Parameter(wide, parameter.requires_grad))


def gate_diagonal(gate: nn.Module, r: int) -> Tensor:
    """The fixed diagonal that a gate is in eval.

    It is read off by sending ones through the gate in eval mode, so a gate need not describe
    itself.

    Args:
        gate: The gate.
        r: The rank that it acts on.

    Returns:
        The diagonal, (r,).
    """
    was_training = gate.training
    held = (*gate.parameters(), *gate.buffers())
    like = next((t for t in held if t.is_floating_point()), torch.empty(0))
    ones = torch.ones(1, r, dtype=like.dtype, device=like.device)
    with torch.no_grad():
        diagonal = gate.eval()(ones)[0]
    gate.train(was_training)
    return diagonal
