"""What groups of weights are worth (LoRAPrune, Zhang et al. 2023, https://arxiv.org/abs/2305.18403).

A group is what leaves a model together: some rows of one matrix, the columns of another that read
what these rows made.
"""

from __future__ import annotations

from torch import Tensor


def score(weight: Tensor, A: Tensor, B: Tensor, grad_A: Tensor, grad_B: Tensor) -> Tensor:
    """``|(∂L/∂B A + B ∂L/∂A - ∂L/∂B ∂L/∂A) ⊙ (W + s B A)|``, the importance of each value.

    The left factor stands for ∂L/∂W: it is what a gradient step of size 1 takes from B A, so that
    no gradient of a frozen matrix is ever needed.

    Args:
        weight: ``W + s B A``, (d_out, d_in).
        A: (r, d_in).
        B: (d_out, r).
        grad_A: ∂L/∂A, (r, d_in).
        grad_B: ∂L/∂B, (d_out, r).

    Returns:
        (d_out, d_in), never negative.
    """
    gradient = grad_B @ A + (B - grad_B) @ grad_A
    return gradient.mul_(weight).abs_()


def sum_of_groups(values: Tensor, dim: int, size: int) -> Tensor:
    """Sums over groups of neighbouring rows or columns.

    Args:
        values: (d_out, d_in).
        dim: 0 where groups are rows, 1 where they are columns.
        size: Rows or columns of one group.

    Returns:
        (groups,).
    """
    return values.sum(1 - dim).view(-1, size).sum(1)


def normalized(sums: Tensor, eps: float = 1e-8) -> Tensor:
    """Sums of one matrix over their norm, to be added to another matrix's, (groups,)."""
    return sums / (sums.norm() + eps)
