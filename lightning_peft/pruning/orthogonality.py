"""Vectors that stand at right angles: a penalty that keeps them so, and new ones beside them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def orthogonality(matrices: Sequence[Tensor]) -> Tensor:
    """Mean over matrices of ``‖M Mᵀ - I‖_F``, zero where the rows of each are orthonormal.

    AdaLoRA's equation 4 (Zhang et al. 2023, https://arxiv.org/abs/2303.10512), as a mean.

    Args:
        matrices: each `(r_i, d_i)`, at least one.

    Returns:
        A scalar.
    """
    grams = [matrix @ matrix.mT for matrix in matrices]
    return torch.stack([(gram - torch.eye(len(gram)).to(gram)).norm() for gram in grams]).mean()


def unit_beside(rows: Tensor, draw: Tensor) -> Tensor:
    """A vector of length one: a drawn one less what `RᵀR` makes of it, R the rows.

    It stands at right angles to rows that are orthonormal, and nearly so to rows that nearly are.

    Args:
        rows: `(r, d)`.
        draw: `(d,)`.

    Returns:
        `(d,)`.
    """
    left = draw - rows.mT @ (rows @ draw)
    return left / (left.norm() + 1e-6)
