"""What the components of dynamic DoRA are worth, and how many stay (Mao et al. 2024).

https://arxiv.org/abs/2405.17357, by the authors' code. AdaLoRA's budget, to compare with, is in
:mod:`.sensitivity`.
"""

from __future__ import annotations

from torch import Tensor


def relative_norms(B: Tensor, c: Tensor, A: Tensor, eps: float = 1e-8) -> Tensor:
    """``‖c_i B_i A_i‖_F / (‖Σ_j c_j B_j A_j‖_F + eps)`` of each component.

    No matrix of the weight's size is made: ``‖B_i A_i‖_F = ‖B_i‖ ‖A_i‖``, and the norm of the sum
    comes from the inner products ``(AAᵀ) ∘ (BᵀB)`` of the components, in float64, since components
    may cancel.

    Args:
        B: `(d_out, r)`.
        c: `(r,)`.
        A: `(r, d_in)`.
        eps: added to the norm of the sum.

    Returns:
        `(r,)`, in the dtype of A. Their sum is at least 1, but for eps.
    """
    B, c, A, dtype = B.double(), c.double(), A.double(), A.dtype
    gram = (A @ A.T) * (B.T @ B)  # (r, r)
    whole = (c @ gram @ c).clamp_min(0).sqrt()
    return (c.abs() * gram.diagonal().sqrt() / (whole + eps)).to(dtype)


def late_budget(
    step: int, start: int, target: int, tinit: int, tfinal: int, total_step: int
) -> int:
    """How many components may live after so many steps: few leave at first, most at the end.

    ``start - (start - target) p³`` with p the part of the way that is gone, from 0 to 1.

    Args:
        step: optimizer steps that are done.
        start: components at the beginning.
        target: components at the end.
        tinit: steps before the first removal.
        tfinal: steps at the end, with the budget fixed.
        total_step: optimizer steps of the whole run.
    """
    if step <= tinit:
        return start
    if step >= total_step - tfinal:
        return target
    gone = (step - tinit) / (total_step - tfinal - tinit)
    return start - int((start - target) * gone**3)
