"""AdaLoRA's budget and importance (Zhang et al. 2023, https://arxiv.org/abs/2303.10512)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def cubic_budget(
    step: int, start: int, target: int, tinit: int, tfinal: int, total_step: int
) -> int:
    """How many components may live after a step, over all matrices (equation 12).

    Args:
        step: optimizer step, 0-based.
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
    left = 1 - (step - tinit) / (total_step - tfinal - tinit)
    return int((start - target) * left**3 + target)


def smooth(
    sensitivity: Tensor, average: Tensor, uncertainty: Tensor, beta1: float, beta2: float
) -> tuple[Tensor, Tensor]:
    """Smoothed sensitivity and its uncertainty after one more step (equations 8 and 9).

    Args:
        sensitivity: `|w · g|` of this step, any shape.
        average: smoothed until now.
        uncertainty: smoothed `|sensitivity - average|` until now.
        beta1: how much of the average stays.
        beta2: how much of the uncertainty stays.

    Returns:
        The new average and uncertainty.
    """
    average = beta1 * average + (1 - beta1) * sensitivity
    uncertainty = beta2 * uncertainty + (1 - beta2) * (sensitivity - average).abs()
    return average, uncertainty


def triplet_score(value: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Importance of each component: its value's, and its vectors' means (equation 7).

    Args:
        value: importance of the singular values, `(r,)`.
        left: of P, `(d_out, r)`.
        right: of Q, `(r, d_in)`.

    Returns:
        `(r,)`.
    """
    return value + left.mean(0) + right.mean(1)


def above_budget(scores: Sequence[Tensor], budget: int) -> list[Tensor]:
    """Which components stay: those above the score of the first that does not fit.

    Ties with that score leave too, as in the authors' code.

    Args:
        scores: for each matrix `(r_i,)`.
        budget: how many may stay over all matrices.

    Returns:
        For each matrix a bool tensor `(r_i,)`.
    """
    flat = torch.cat([score.flatten() for score in scores])
    if budget >= len(flat):
        return [torch.ones_like(score, dtype=torch.bool) for score in scores]
    threshold = flat.kthvalue(len(flat) - budget).values
    return [score > threshold for score in scores]
