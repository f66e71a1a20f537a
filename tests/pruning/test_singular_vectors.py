"""Singular vectors against numpy's, and LoRA-GA's start against what it is for."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lightning_peft.pruning.singular_vectors import gradient_factors, truncated_svd


@pytest.fixture
def matrix() -> torch.Tensor:
    return torch.randn(9, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("arguments", [{}, {"niter": 4, "width": 7}])
@pytest.mark.parametrize("r", [1, 3, 7])
def test_the_largest_values_and_their_vectors_are_numpys(matrix, r, arguments) -> None:
    left, values, right = truncated_svd(matrix, r, **arguments)
    theirs = np.linalg.svd(matrix.numpy(), full_matrices=False)
    assert (left.shape, values.shape, right.shape) == ((9, r), (r,), (r, 7))
    assert np.allclose(values.numpy(), theirs[1][:r])
    part = (theirs[0][:, :r] * theirs[1][:r]) @ theirs[2][:r]
    assert np.allclose(((left * values) @ right).numpy(), part)
    assert torch.allclose(left.T @ left, torch.eye(r, dtype=torch.float64))


def test_a_wider_decomposition_is_nearer() -> None:
    matrix = torch.randn(60, 50, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    exact = truncated_svd(matrix, 4)[1]
    torch.manual_seed(0)
    errors = [(truncated_svd(matrix, 4, 2, w)[1] - exact).norm() for w in (None, 4, 32)]
    assert errors[2] < 0.05 * min(errors[:2])


def test_more_values_than_there_are_is_refused(matrix) -> None:
    sentence = "^r = 8 is above the 7 singular values of a 9 x 7 matrix.$"
    with pytest.raises(ValueError, match=sentence):
        truncated_svd(matrix, 8)


@pytest.mark.parametrize("niter", [None, 8])
@pytest.mark.parametrize("gamma", [4.0, 16.0])
def test_a_step_follows_the_best_approximation_of_rank_2_r(matrix, gamma, niter) -> None:
    r, rate = 3, 1e-6
    B, A = gradient_factors(matrix, r, gamma, niter)
    assert (B.shape, A.shape) == ((9, r), (r, 7))
    stepped_B, stepped_A = B - rate * matrix @ A.T, A - rate * B.T @ matrix
    left, values, right = np.linalg.svd(matrix.numpy(), full_matrices=False)
    best = (left[:, : 2 * r] * values[: 2 * r]) @ right[: 2 * r]
    step = (B @ A - stepped_B @ stepped_A).numpy() / rate
    assert np.allclose(step, best * 9**0.5 / gamma, atol=1e-4)
