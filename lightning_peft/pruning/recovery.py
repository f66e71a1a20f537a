"""What the surviving components take over from the removed ones.

Both recoveries return δ in the full shape `(..., d, r)`: `−W_P` in the removed columns P, so that
`W + δ` is exactly zero there, and the survivors' change in the others.

`gradient_recovery` is PrunedLoRA's, exact for its second-order model of the loss; with one batch's
undamped H it diverges in training, so give it a damped average and a bound. `activation_recovery`
is least squares on the layer's own output, as in SparseGPT (https://arxiv.org/abs/2301.00774).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_peft.pruning.linalg import as_double, damped, inverse_spd, survivors


def gradient_recovery(
    W: Tensor,
    grad: Tensor,
    H: Tensor,
    removed: Tensor,
    max_ratio: float | None = None,
    first_order: bool = True,
) -> Tensor:
    """Return the minimiser of `⟨G, δ⟩ + ½ tr(δ H δᵀ)` under `δ e_j = −W_j` for all removed j.

    With P the removed components, all at once:

        δ = −G H⁻¹ − (W_P − (G H⁻¹)_P) [H⁻¹]_PP⁻¹ [H⁻¹]_P,:

    For A pass transposes: `gradient_recovery(A.mT, grad_A.mT, H_A, removed).mT`.

    Args:
        W: B, or A transposed, `(..., d, r)`.
        grad: G, `(..., d, r)`.
        H: symmetric positive definite, `(..., r, r)`; `damped` makes it so. NaN where it is not.
        removed: P, distinct indices, `(..., k)`, or `(k,)` for all matrices.
        max_ratio: passed to `bounded`; None for the exact minimiser.
        first_order: whether to keep the step `−G H⁻¹`; without it G counts as zero.

    Returns:
        δ, `(..., d, r)`, in W's dtype.
    """
    inverse = inverse_spd(H)
    removed = _for_each_matrix(removed, W).to(inverse.device)
    inverse_P = inverse.take_along_dim(removed[..., :, None], dim=-2)  # (..., k, r)
    inverse_PP = inverse_P.take_along_dim(removed[..., None, :], dim=-1)  # (..., k, k)
    newton = as_double(grad) @ inverse if first_order else torch.zeros_like(as_double(W))
    excess = (as_double(W) - newton).take_along_dim(removed[..., None, :], dim=-1)  # (..., d, k)
    delta = -newton - excess @ (inverse_spd(inverse_PP) @ inverse_P)  # (..., d, r)
    if max_ratio is not None:
        return bounded(delta, W, removed, max_ratio)
    return _clear_removed(delta, W, removed)


def bounded(delta: Tensor, W: Tensor, removed: Tensor, max_ratio: float) -> Tensor:
    """Return δ with the survivors' change scaled down to at most `max_ratio · ‖W_P‖_F`.

    Each matrix has its own norms; the change keeps its direction. The removed columns stay `−W_P`.

    Args:
        delta: δ as the recoveries return it, `(..., d, r)`.
        W: what δ is added to, `(..., d, r)`.
        removed: P, `(..., k)` or `(k,)`.
        max_ratio: the bound, relative to the Frobenius norm of what was removed; 0 is plain
            removal.

    Returns:
        `(..., d, r)`, in W's dtype.
    """
    change = as_double(delta)
    removed = _for_each_matrix(removed, W).to(change.device)
    gone = as_double(W).take_along_dim(removed[..., None, :], dim=-1)  # (..., d, k)
    change = change.scatter(-1, _as_columns(removed, W), 0)  # (..., d, r)
    limit = max_ratio * torch.linalg.matrix_norm(gone)  # (...)
    norm = torch.linalg.matrix_norm(change)
    factor = torch.where(norm > limit, limit / norm, torch.ones_like(norm))
    return _clear_removed(change * factor[..., None, None], W, removed)


def activation_recovery(
    B: Tensor, second_moment: Tensor, removed: Tensor, damping: float = 0.01
) -> Tensor:
    """Return the change of B that keeps the layer's output nearest to what it was.

    With `C = E[z zᵀ]`, P removed and K kept, the minimiser of
    `E‖B z − (B + ΔB)_K z_K‖² + λ ‖ΔB_K‖²`:

        ΔB_K = B_P C_PK (C_KK + λI)⁻¹,   λ = damping · mean(diag C) over all r components

    It is `gradient_recovery` without first order and with `H = damped(C, damping)`, but needs only
    `C_KK + λI` to be invertible.

    Args:
        B: `(..., d_out, r)`.
        second_moment: C, `(..., r, r)`.
        removed: P, distinct indices, `(..., k)`, or `(k,)` for all matrices.
        damping: relative to the mean diagonal; with 0, NaN where C_KK is singular.

    Returns:
        ΔB, `(..., d_out, r)` in B's dtype, with `−B_P` in the removed columns.
    """
    C = damped(second_moment, damping)
    removed = _for_each_matrix(removed, B).to(C.device)
    kept = survivors(removed, B.shape[-1])  # (..., r - k)
    C_K = C.take_along_dim(kept[..., None, :], dim=-1)  # (..., r, r - k)
    C_KK = C_K.take_along_dim(kept[..., :, None], dim=-2)  # (..., r - k, r - k)
    C_PK = C_K.take_along_dim(removed[..., :, None], dim=-2)  # (..., k, r - k)
    B_P = as_double(B).take_along_dim(removed[..., None, :], dim=-1)  # (..., d_out, k)
    change = B_P @ (C_PK @ inverse_spd(C_KK))  # (..., d_out, r - k)
    delta = torch.zeros_like(as_double(B)).scatter(-1, _as_columns(kept, B), change)
    return _clear_removed(delta, B, removed)


def _for_each_matrix(removed: Tensor, W: Tensor) -> Tensor:
    """Return `removed` as `(..., k)` with the leading dimensions of W `(..., d, r)`."""
    return removed.expand(*W.shape[:-2], removed.shape[-1])


def _as_columns(indices: Tensor, W: Tensor) -> Tensor:
    """Return `(..., k)` column indices repeated over the rows of W, as `(..., d, k)`."""
    return indices[..., None, :].expand(*W.shape[:-1], indices.shape[-1])


def _clear_removed(delta: Tensor, W: Tensor, removed: Tensor) -> Tensor:
    """Return δ in W's dtype, with exactly `−W_P` in the removed columns, free of rounding."""
    columns = _as_columns(removed, W).to(W.device)
    W = W.detach()
    return delta.to(W).scatter(-1, columns, -W.gather(-1, columns))
