"""Factors of a weight from its singular values, at which an adapter may start.

With `W = U S Vᵀ` and r of the singular values, `B = U_r √(S_r / s)` and `A = √(S_r / s) V_rᵀ`, so
that the adapter's product `s B A` is that part of W. PiSSA (https://arxiv.org/abs/2404.02948,
equations 2 to 4) takes the largest values, MiLoRA (https://arxiv.org/abs/2406.09044, equation 5)
the smallest.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_peft.errors import UserError


def principal_factors(
    weight: Tensor, r: int, scaling: float, niter: int | None = None
) -> tuple[Tensor, Tensor]:
    """Factors of the part with the r largest singular values.

    Args:
        weight: `(d_out, d_in)`.
        r: How many singular values, at most min(d_out, d_in).
        scaling: s, by which the product of the factors will be multiplied.
        niter: Iterations of a randomised decomposition (Halko et al. 2009), which draws from
            torch's global stream; None for the exact one.

    Returns:
        B `(d_out, r)` and A `(r, d_in)`.

    Raises:
        UserError: If the weight has fewer than r singular values.
    """
    _check_rank(weight, r)
    if niter is None:
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
    else:
        left, values, right = torch.svd_lowrank(weight, q=r, niter=niter)
        right = right.mT
    return _factors(left[:, :r], values[:r], right[:r], scaling)


def minor_factors(weight: Tensor, r: int, scaling: float) -> tuple[Tensor, Tensor]:
    """Factors of the part with the r smallest singular values.

    Args:
        weight: `(d_out, d_in)`.
        r: How many singular values, at most min(d_out, d_in).
        scaling: s, by which the product of the factors will be multiplied.

    Returns:
        B `(d_out, r)` and A `(r, d_in)`.

    Raises:
        UserError: If the weight has fewer than r singular values.
    """
    _check_rank(weight, r)
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    return _factors(left[:, -r:], values[-r:], right[-r:], scaling)


def _factors(left: Tensor, values: Tensor, right: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    root = (values / scaling).sqrt()
    return left * root, root[:, None] * right


def _check_rank(weight: Tensor, r: int) -> None:
    if r > min(weight.shape):
        raise UserError(
            f"r = {r} is above the {min(weight.shape)} singular values of a "
            f"{weight.shape[0]} x {weight.shape[1]} weight."
        )
