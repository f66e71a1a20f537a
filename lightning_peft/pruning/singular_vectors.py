"""The largest singular values of a matrix with their vectors, and LoRA-GA's start from them."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_peft.errors import UserError


def truncated_svd(
    matrix: Tensor, r: int, niter: int | None = None, width: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The r largest singular values and their vectors, `M ≈ U S Vᵀ`.

    Args:
        matrix: `(m, n)`.
        r: How many singular values, at most min(m, n).
        niter: Iterations of a randomised decomposition (Halko et al. 2009), which draws from
            torch's global stream; None for the exact one.
        width: Vectors that the randomised one works with, r or more, for exactness; r when None.

    Returns:
        U `(m, r)`, S `(r,)` in decreasing order, and Vᵀ `(r, n)`.

    Raises:
        UserError: If the matrix has fewer than r singular values.
    """
    if r > min(matrix.shape):
        raise UserError(
            f"r = {r} is above the {min(matrix.shape)} singular values of a "
            f"{matrix.shape[0]} x {matrix.shape[1]} matrix."
        )
    if niter is None:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    else:
        q = min(max(width or r, r), *matrix.shape)
        left, values, right = torch.svd_lowrank(matrix, q=q, niter=niter)
        right = right.mT
    return left[:, :r], values[:r], right[:r]


def gradient_factors(
    gradient: Tensor, r: int, gamma: float, niter: int | None = None
) -> tuple[Tensor, Tensor]:
    """Factors at which LoRA's first step is nearest to that of full fine-tuning (LoRA-GA).

    With `G = U S Vᵀ`, `A = c V_{1:r}ᵀ` and `B = c U_{r+1:2r}`, `c = d_out^¼ / √γ`. A step of
    gradient descent then changes `B A` along the best approximation of G of rank 2 r.

    Args:
        gradient: G, `(d_out, d_in)`.
        r: Rank, at most half of min(d_out, d_in).
        gamma: γ; the larger, the smaller the start.
        niter: Iterations of a randomised decomposition, of 4 r vectors; None for the exact one.

    Returns:
        B `(d_out, r)` and A `(r, d_in)`.
    """
    left, _, right = truncated_svd(gradient, 2 * r, niter, width=4 * r)
    scale = gradient.shape[0] ** 0.25 / gamma**0.5
    return scale * left[:, r:], scale * right[:r]
