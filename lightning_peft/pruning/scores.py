"""What a rank component is worth: the criteria that PrunedLoRA compares.

Component j of a LoRA is the pair (column `B_j`, row `A_j`). Every function gives one score for each
component, `(..., r)` in float64, for any leading dimensions (n matrices of one shape at once); the
lowest scores are removed. No gradient flows through them.

PrunedLoRA itself uses `gradient_score`, a second-order model of the loss. The others are its
rivals: LLM-Pruner (https://arxiv.org/abs/2305.11627), Wanda (https://arxiv.org/abs/2306.11695) and
SparseGPT (https://arxiv.org/abs/2301.00774), each applied to rank components instead of weights,
magnitude and chance.

Which depend on the loss: `gradient_score` and the three of LLM-Pruner take gradients, which must be
those of the mean loss of one optimizer step, unscaled, unclipped, and reduced over ranks. With the
loss multiplied by c, element1 grows by c and element2 by c² (the same order), taylor2 and
`gradient_score` may order components otherwise. A gradient that is not finite gives NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_peft.pruning.linalg import as_double, damped, gram, inverse_spd


def gradient_score(
    B: Tensor,
    grad_B: Tensor,
    A: Tensor,
    grad_A: Tensor,
    eps: float = 1e-6,
    first_order: bool = True,
    H_B: Tensor | None = None,
    H_A: Tensor | None = None,
) -> Tensor:
    """Return PrunedLoRA's score, the sum over B and A of how much better the loss could be.

    With `G_B = ∂L/∂B` and `H_B = G_Bᵀ G_B + εI`, and the same for A with rows as columns:

        score_j = ½ ‖B_j − (G_B H_B⁻¹)_j‖² / [H_B⁻¹]_jj + ½ ‖A_j − (H_A⁻¹ G_A)_j‖² / [H_A⁻¹]_jj

    It is the minimum of `⟨G, δ⟩ + ½ tr(δ H δᵀ)` under `δ e_j = −B_j` minus the minimum without that
    constraint. It is not the increase of the loss by plain removal.

    Args:
        B: `(..., d_out, r)`.
        grad_B: `∂L/∂B`, `(..., d_out, r)`.
        A: `(..., r, d_in)`.
        grad_A: `∂L/∂A`, `(..., r, d_in)`.
        eps: ε, absolute, so that scores depend on the loss's scale. Zero needs gradients of rank r.
        first_order: whether to keep `G H⁻¹`; without it the score is `½ ‖B_j‖² / [H_B⁻¹]_jj + …`.
        H_B: used in place of `G_Bᵀ G_B`, `(..., r, r)`, such as its mean over steps; ε is added.
        H_A: used in place of `G_A G_Aᵀ`, `(..., r, r)`; ε is added.

    Returns:
        `(..., r)`, float64.
    """
    of_B = _constrained_gap(B, grad_B, eps, first_order, H_B)
    return of_B + _constrained_gap(A.mT, grad_A.mT, eps, first_order, H_A)


def _constrained_gap(
    W: Tensor, grad: Tensor, eps: float, first_order: bool, H: Tensor | None
) -> Tensor:
    """Return `½ ‖W_j − (G H⁻¹)_j‖² / [H⁻¹]_jj` for W and G `(..., d, r)`, as `(..., r)`."""
    H = gram(grad) if H is None else as_double(H)
    inverse = inverse_spd(H + eps * torch.eye(H.shape[-1], dtype=H.dtype, device=H.device))
    distance = as_double(W)  # (..., d, r)
    if first_order:
        distance = distance - as_double(grad) @ inverse
    return 0.5 * distance.square().sum(-2) / inverse.diagonal(dim1=-2, dim2=-1)


def _sum_over_pair(of_B: Tensor, of_A: Tensor) -> Tensor:
    """Return the sum over B_j `(..., d_out, r)` and A_j `(..., r, d_in)`, as `(..., r)`."""
    return of_B.sum(-2) + of_A.sum(-1)


def llm_pruner_element1(B: Tensor, grad_B: Tensor, A: Tensor, grad_A: Tensor) -> Tensor:
    """Return LLM-Pruner's first-order score, `Σ |w g|` over the elements of B_j and A_j.

    Args:
        B: `(..., d_out, r)`.
        grad_B: `∂L/∂B`, `(..., d_out, r)`.
        A: `(..., r, d_in)`.
        grad_A: `∂L/∂A`, `(..., r, d_in)`.

    Returns:
        `(..., r)`, float64; proportional to the loss's scale.
    """
    wg_B, wg_A = _weight_times_gradient(B, grad_B), _weight_times_gradient(A, grad_A)
    return _sum_over_pair(wg_B.abs(), wg_A.abs())


def llm_pruner_element2(B: Tensor, grad_B: Tensor, A: Tensor, grad_A: Tensor) -> Tensor:
    """Return LLM-Pruner's second-order score, `Σ (w g)²` over the elements of B_j and A_j.

    Args:
        B: `(..., d_out, r)`.
        grad_B: `∂L/∂B`, `(..., d_out, r)`.
        A: `(..., r, d_in)`.
        grad_A: `∂L/∂A`, `(..., r, d_in)`.

    Returns:
        `(..., r)`, float64; proportional to the square of the loss's scale.
    """
    wg_B, wg_A = _weight_times_gradient(B, grad_B), _weight_times_gradient(A, grad_A)
    return _sum_over_pair(wg_B.square(), wg_A.square())


def llm_pruner_taylor2(B: Tensor, grad_B: Tensor, A: Tensor, grad_A: Tensor) -> Tensor:
    """Return LLM-Pruner's mixed score, `Σ |w g − ½ (w g)²|` over the elements of B_j and A_j.

    Args:
        B: `(..., d_out, r)`.
        grad_B: `∂L/∂B`, `(..., d_out, r)`.
        A: `(..., r, d_in)`.
        grad_A: `∂L/∂A`, `(..., r, d_in)`.

    Returns:
        `(..., r)`, float64; its order depends on the loss's scale.
    """
    wg_B, wg_A = _weight_times_gradient(B, grad_B), _weight_times_gradient(A, grad_A)
    return _sum_over_pair((wg_B - 0.5 * wg_B.square()).abs(), (wg_A - 0.5 * wg_A.square()).abs())


def _weight_times_gradient(W: Tensor, grad: Tensor) -> Tensor:
    return as_double(W) * as_double(grad)


def wanda_score(B: Tensor, second_moment: Tensor) -> Tensor:
    """Return Wanda's `‖z_j‖ · ‖B_j‖`, the root mean square of what component j adds to the output.

    `‖z_j‖` is `√C_jj` with `C = E[z zᵀ]` the **mean** over tokens; the paper's norm is over all N
    tokens, √N times as large, which is the same order among matrices that saw the same tokens. `z`
    is `A x` before the gate and without the scaling s, which multiplies all scores of a matrix.

    Args:
        B: `(..., d_out, r)`.
        second_moment: C, `(..., r, r)`; only its diagonal is read.

    Returns:
        `(..., r)`, float64.
    """
    rms = as_double(second_moment).diagonal(dim1=-2, dim2=-1).sqrt()  # (..., r)
    return rms * torch.linalg.vector_norm(as_double(B), dim=-2)


def sparsegpt_score(B: Tensor, second_moment: Tensor, damping: float = 0.01) -> Tensor:
    """Return SparseGPT's `‖B_j‖² / [C⁻¹]_jj`, the output's error after the best recovery.

    With `C = E[z zᵀ]` and damping 0 it is `min E‖δ z‖²` under `δ e_j = −B_j`, per token and without
    the scaling s; `activation_recovery` with the same damping gives that δ.

    Args:
        B: `(..., d_out, r)`.
        second_moment: C, `(..., r, r)`.
        damping: what is added to C's diagonal, relative to its mean.

    Returns:
        `(..., r)`, float64.
    """
    inverse = inverse_spd(damped(second_moment, damping))
    return as_double(B).square().sum(-2) / inverse.diagonal(dim1=-2, dim2=-1)


def magnitude_score(B: Tensor, A: Tensor) -> Tensor:
    """Return `‖B_j‖ · ‖A_j‖`, the Frobenius norm of component j's part `B_j A_j` of ΔW.

    Unlike `‖B_j‖ + ‖A_j‖` it does not change under B → cB, A → A/c, which leaves ΔW as it is. While
    B is zero all components are worth zero.

    Args:
        B: `(..., d_out, r)`.
        A: `(..., r, d_in)`.

    Returns:
        `(..., r)`, float64.
    """
    norm_B = torch.linalg.vector_norm(as_double(B), dim=-2)
    return norm_B * torch.linalg.vector_norm(as_double(A), dim=-1)


def random_score(B: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Return uniform random scores, the baseline that asks whether a criterion helps at all.

    Args:
        B: `(..., d_out, r)`; only its shape and device are read.
        generator: drawn from, on its own device; torch's global CPU generator by default. Data
            parallel ranks need generators in one state to remove the same components.

    Returns:
        `(..., r)` in [0, 1), float64.
    """
    device = torch.device("cpu") if generator is None else generator.device
    shape = (*B.shape[:-2], B.shape[-1])
    scores = torch.rand(shape, generator=generator, dtype=torch.float64, device=device)
    return scores if B.device.type == "mps" else scores.to(B.device)
