"""The score against loops over single values, and against the gradient that it stands for."""

from __future__ import annotations

import pytest
import torch

from lightning_peft.pruning.lora_prune import normalized, score, sum_of_groups


def matrices(dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(*size, dtype=dtype) for size in ((6, 8), (2, 8), (6, 2), (2, 8), (6, 2))]


def test_the_score_is_that_of_loops_over_single_values() -> None:
    weight, A, B, grad_A, grad_B = given = matrices()
    before = [matrix.clone() for matrix in given]
    found = score(*given)
    for i in range(6):
        for j in range(8):
            gradient = sum(
                grad_B[i, k] * A[k, j] + B[i, k] * grad_A[k, j] - grad_B[i, k] * grad_A[k, j]
                for k in range(2)
            )
            assert found[i, j] == pytest.approx(abs(float(gradient * weight[i, j])))
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))


def test_the_gradient_is_what_a_step_of_size_one_takes_from_the_product() -> None:
    weight, A, B, grad_A, grad_B = matrices()
    taken = B @ A - (B - grad_B) @ (A - grad_A)
    found = score(weight, A, B, grad_A, grad_B)
    torch.testing.assert_close(found, (taken * weight).abs())


@pytest.mark.parametrize(("dim", "size"), [(0, 1), (0, 3), (1, 1), (1, 4)])
def test_groups_are_neighbouring_rows_or_columns(dim: int, size: int) -> None:
    values = torch.randn(6, 8, dtype=torch.float64)
    expected = [part.sum() for part in values.split(size, dim)]
    torch.testing.assert_close(sum_of_groups(values, dim, size), torch.stack(expected))


def test_sums_are_divided_by_their_norm_and_zeros_stay_zeros() -> None:
    torch.testing.assert_close(normalized(torch.tensor([3.0, 4.0])), torch.tensor([0.6, 0.8]))
    assert torch.equal(normalized(torch.zeros(3)), torch.zeros(3))
