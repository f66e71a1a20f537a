"""What no LoRA can do without, timed alone: its products, its optimizer, the passes of dropout.

Beside PEFT's overhead they say what of it can be saved at all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from models import Shape, ours
from torch import Tensor

from lightning_peft.adapters.dropout import draw

SCALE, P = 2.0, 0.05


class _Layers:
    """The adapted linears that read one input, with tensors of their own."""

    def __init__(self, n: int, d_in: int, outputs: list[int], r: int) -> None:
        self.x, self.grad_x = torch.randn(n, d_in), torch.randn(n, d_in)
        self.layers = [
            (
                torch.randn(r, d_in) / d_in,
                torch.randn(d_out, r) / d_out,
                torch.randn(n, d_out),
                torch.randn(n, d_out) / n,
            )
            for d_out in outputs
        ]

    def run(self, dropout: bool) -> None:
        """The six products of each; with dropout one draw, and its mask there and back."""
        keep = draw(self.x.shape, 1 - P, self.x.device) if dropout else None
        x = self.x if keep is None else self.x * keep.to(self.x.dtype)
        through: Tensor | None = None
        for A, B, y, grad_y in self.layers:
            z = x @ A.T
            y.addmm_(z, B.T, alpha=SCALE)
            (z.mul_(SCALE).T @ grad_y).T  # noqa: B018 - the gradient of B
            grad_z = (grad_y @ B).mul_(SCALE)
            grad_z.T @ x  # noqa: B018 - the gradient of A
            if keep is None:
                self.grad_x.addmm_(grad_z, A)
            else:
                through = grad_z @ A if through is None else through.addmm_(grad_z, A)
        if keep is not None and through is not None:
            self.grad_x.add_(through.mul_(keep.to(x.dtype)))


def products(shape: Shape, dropout: bool = False) -> Callable[[], None]:
    """The products with all A and B of one step, forward and backward.

    Args:
        shape: Of model and batch.
        dropout: With the passes of a dropout that is drawn once for each input.
    """
    n, h, inner = shape.batch * shape.tokens, shape.hidden, shape.intermediate
    reads = [(h, [h, h, h]), (h, [inner]), (inner, [h])]  # q, k, v; up; down
    groups = [
        _Layers(n, d_in, outputs, shape.r) for _ in range(shape.layers) for d_in, outputs in reads
    ]

    @torch.no_grad()
    def run() -> None:
        for group in groups:
            group.run(dropout)

    return run


def optimizer_step(shape: Shape, optimizer: Any = torch.optim.AdamW) -> Callable[[], Any]:
    """The optimizer's step over the adapters alone, on gradients that stay.

    Args:
        shape: Of the model.
        optimizer: Makes the optimizer.
    """
    step = ours(shape, optimizer=optimizer)
    model, made = step.model, step.optimizer  # type: ignore[attr-defined]
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn_like(parameter)
    return made.step
