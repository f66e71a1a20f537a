"""Exact covariance of activations that come in batches, and its principal directions.

Sums of products of values whose mean is far from zero lose the variance to rounding. Here each
batch is centred by its own mean, and two are put together by Chan, Golub and LeVeque's formula
(1979), `S = S₁ + S₂ + n₁ n₂ / (n₁ + n₂) · (μ₁ - μ₂)(μ₁ - μ₂)ᵀ`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Moments(NamedTuple):
    """Count, mean and scatter of rows.

    Attributes:
        n: how many, a scalar, float64.
        mean: μ, `(d,)`.
        scatter: `Σ (x - μ)(x - μ)ᵀ`, `(d, d)`.
    """

    n: Tensor
    mean: Tensor
    scatter: Tensor


def moments(x: Tensor) -> Moments:
    """Return the moments of the rows of x, `(n, d)` with n at least 1, in float32 at least."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    mean = x.mean(0)
    centred = x - mean
    n = torch.tensor(float(len(x)), dtype=torch.float64, device=x.device)
    return Moments(n, mean, centred.T @ centred)


def together(one: Moments, other: Moments) -> Moments:
    """Return the moments of the rows of both; changes the scatter of the first in place."""
    n = one.n + other.n
    share = (other.n / n).to(one.mean.dtype)
    gap = other.mean - one.mean
    scatter = one.scatter.add_(other.scatter)
    scatter.addr_(gap * (one.n.to(gap.dtype) * share), gap)
    return Moments(n, one.mean + gap * share, scatter)


def principal(scatter: Tensor) -> tuple[Tensor, Tensor]:
    """Return the shares of the variance and the directions that have them, the largest first.

    The value of largest magnitude of each direction is positive.

    Args:
        scatter: `(d, d)`, or a multiple of it.

    Returns:
        Shares `(d,)`, all zero where there is no variance, and directions in rows, `(d, d)`;
        float64.
    """
    values, vectors = torch.linalg.eigh(scatter.double())
    values, directions = values.flip(0).clamp_min(0), vectors.T.flip(0)
    total = values.sum()
    largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
    shares = values / total if total > 0 else torch.zeros_like(values)
    return shares, directions * largest.sign()
