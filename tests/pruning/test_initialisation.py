"""Factors of a weight against numpy's singular values."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lightning_peft.pruning.initialisation import minor_factors, principal_factors


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(7, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def part(weight: torch.Tensor, chosen: slice) -> np.ndarray:
    left, values, right = np.linalg.svd(weight.numpy(), full_matrices=False)
    return (left[:, chosen] * values[chosen]) @ right[chosen]


@pytest.mark.parametrize("scaling", [1.0, 2.5])
@pytest.mark.parametrize("r", [1, 3, 5])
def test_the_scaled_product_is_the_part_of_the_largest_values(
    weight: torch.Tensor, r: int, scaling: float
) -> None:
    B, A = principal_factors(weight, r, scaling)
    assert (B.shape, A.shape) == ((7, r), (r, 5))
    assert np.allclose(scaling * (B @ A).numpy(), part(weight, slice(r)))


@pytest.mark.parametrize("r", [1, 3, 5])
def test_the_minor_part_is_that_of_the_smallest_values(weight: torch.Tensor, r: int) -> None:
    B, A = minor_factors(weight, r, 2.0)
    assert (B.shape, A.shape) == ((7, r), (r, 5))
    assert np.allclose(2.0 * (B @ A).numpy(), part(weight, slice(5 - r, 5)))


def test_both_factors_bear_the_root_of_the_values(weight: torch.Tensor) -> None:
    values = np.linalg.svd(weight.numpy(), compute_uv=False)
    B, A = principal_factors(weight, 4, 2.0)
    assert np.allclose(B.square().sum(0), values[:4] / 2.0)
    assert np.allclose(A.square().sum(1), values[:4] / 2.0)


def test_the_randomised_decomposition_finds_values_that_stand_apart() -> None:
    generator = torch.Generator().manual_seed(1)
    left, _ = torch.linalg.qr(torch.randn(40, 40, generator=generator, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(30, 30, generator=generator, dtype=torch.float64))
    values = torch.tensor([100.0, 50.0, 20.0] + [0.01] * 27, dtype=torch.float64)
    weight = (left[:, :30] * values) @ right
    torch.manual_seed(0)
    B, A = principal_factors(weight, 3, 1.0, niter=8)
    assert np.allclose((B @ A).numpy(), part(weight, slice(3)), atol=1e-3)


@pytest.mark.parametrize("factors", [principal_factors, minor_factors])
def test_a_rank_above_the_number_of_values_is_refused(factors, weight: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="r = 6 is above the 5 singular values of a 7 x 5 weight"):
        factors(weight, 6, 1.0)
