"""The penalty by loops, and vectors at right angles."""

from __future__ import annotations

import torch

from lightning_peft.pruning.orthogonality import orthogonality, unit_beside


def test_the_penalty_by_loops() -> None:
    matrices = [torch.randn(3, 7), torch.randn(2, 5)]
    total = 0.0
    for matrix in matrices:
        squares = 0.0
        for i, one in enumerate(matrix):
            for j, other in enumerate(matrix):
                squares += (float(one @ other) - (i == j)) ** 2
        total += squares**0.5 / len(matrices)
    torch.testing.assert_close(orthogonality(matrices), torch.tensor(total))


def test_orthonormal_rows_have_no_penalty_and_a_gradient_of_zero() -> None:
    rows = torch.eye(3, 6).requires_grad_()
    orthogonality([rows]).backward()
    assert torch.equal(rows.grad, torch.zeros(3, 6))  # type: ignore[arg-type]


def test_a_vector_stands_at_right_angles_to_orthonormal_rows() -> None:
    rows = torch.linalg.qr(torch.randn(9, 4))[0].T
    draw = torch.randn(9)
    found = unit_beside(rows, draw)
    torch.testing.assert_close(rows @ found, torch.zeros(4), rtol=0, atol=1e-6)
    torch.testing.assert_close(found.norm(), torch.tensor(1.0))
    assert float(found @ draw) > 0
