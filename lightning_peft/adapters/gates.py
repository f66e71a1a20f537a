"""What may stand between A and B.

A gate is any ``nn.Module`` that maps rank activations (..., r) to (..., r). Three promises make it
work with everything else:

* in eval it is a fixed diagonal, so that it folds into B (``nn.Dropout`` is one: the identity);
* it draws from torch's global random stream, which activation checkpointing and resume restore;
* where it holds a value for each component, ``keep(indices)`` drops those of removed components.

A gate that holds one draw over a whole optimizer step has ``new_step()``, which the strategy calls
after each step.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


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


def keep_in_gate(gate: nn.Module, indices: Tensor, r: int) -> None:
    """Drop what a gate holds for removed components.

    Args:
        gate: The gate.
        indices: The survivors, (k,).
        r: The rank before.

    Raises:
        ValueError: If the gate holds values for each component but has no ``keep``.
    """
    if hasattr(gate, "keep"):
        gate.keep(indices)  # type: ignore[operator]
    elif any(r in t.shape for t in (*gate.parameters(), *gate.buffers())):
        raise ValueError(
            f"{type(gate).__name__} holds a value for each component and cannot lose ranks: "
            "give it a method keep(indices) that keeps those at the given indices."
        )
