"""The r × r linear algebra that scores and recovery share.

Everything here works on `(..., r, r)` or `(..., d, r)` with any leading dimensions, so that one
pruning event needs one factorisation for each shape of matrix, and nothing here waits for the
device.
"""

from __future__ import annotations

import torch
from torch import Tensor


def as_double(tensor: Tensor) -> Tensor:
    """Return `tensor` detached and in float64.

    Float64 is part of the method: the gradient scores of one matrix differ by small amounts
    around a common value, and autocast and TF32 leave float64 alone. Apple's `mps` has no
    float64, so its tensors come to the CPU.

    Args:
        tensor: of any shape and dtype.
    """
    tensor = tensor.detach()
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


def gram(columns: Tensor) -> Tensor:
    """Return the Gram matrix `XᵀX` of the columns of X, in float64.

    `gram(grad_B)` is PrunedLoRA's `G_Bᵀ G_B`, `gram(grad_A.mT)` its `G_A G_Aᵀ`.

    Args:
        columns: X, `(..., d, r)`.

    Returns:
        `(..., r, r)`, float64.
    """
    columns = as_double(columns)
    return columns.mT @ columns  # (..., r, r)


def damped(H: Tensor, damping: float) -> Tensor:
    """Return `H + damping · mean(diag H) · I`, in float64.

    Where H is all zero (A has no gradient while B is zero, say) the mean counts as one: every
    multiple of the identity then leads to plain removal, and a singular H to NaN.

    Args:
        H: symmetric positive semi-definite, `(..., r, r)`.
        damping: relative to the mean of each matrix's own diagonal; 0 changes nothing.

    Returns:
        `(..., r, r)`, float64.
    """
    H = as_double(H)
    mean = H.diagonal(dim1=-2, dim2=-1).mean(-1)  # (...)
    mean = torch.where(mean > 0, mean, torch.ones_like(mean))
    eye = torch.eye(H.shape[-1], dtype=H.dtype, device=H.device)
    return H + damping * mean[..., None, None] * eye


def inverse_spd(H: Tensor) -> Tensor:
    """Return `H⁻¹` of symmetric positive definite matrices, by Cholesky in float64.

    A matrix that is not positive definite, or not finite, gives NaN instead of an error, since an
    error would need the host to wait for the device. One bad matrix leaves the others of its batch
    as they are.

    Args:
        H: `(..., r, r)`.

    Returns:
        `(..., r, r)`, float64.
    """
    H = as_double(H)
    factor, info = torch.linalg.cholesky_ex(H)
    failed = (info != 0)[..., None, None]
    factor = torch.where(failed, torch.full_like(factor, torch.nan), factor)
    eye = torch.eye(H.shape[-1], dtype=H.dtype, device=H.device).expand_as(H)
    inverse_factor = torch.linalg.solve_triangular(factor, eye, upper=False)
    return inverse_factor.mT @ inverse_factor


def survivors(removed: Tensor, r: int) -> Tensor:
    """Return the components that are not removed, in ascending order.

    Args:
        removed: distinct indices in `[0, r)`, `(..., k)`.
        r: the rank before removal.

    Returns:
        `(..., r - k)`, int64, on the device of `removed`.
    """
    gone = torch.zeros(*removed.shape[:-1], r, dtype=torch.int64, device=removed.device)
    gone = gone.scatter(-1, removed, 1)  # (..., r)
    return gone.argsort(dim=-1, stable=True)[..., : r - removed.shape[-1]]
