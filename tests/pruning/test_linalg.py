"""The small linear algebra against numpy."""

from __future__ import annotations

import numpy as np
import torch

from lightning_peft.pruning import damped, gram, inverse_spd, survivors


def test_gram_is_the_product_of_the_columns_in_float64() -> None:
    X = torch.randn(3, 6, 4)
    expected = np.einsum("nij,nik->njk", X.double().numpy(), X.double().numpy())
    torch.testing.assert_close(gram(X), torch.from_numpy(expected))


def test_damping_adds_a_share_of_each_matrix_own_mean_diagonal() -> None:
    H = torch.stack([torch.diag(torch.tensor([1.0, 3.0])), torch.full((2, 2), 10.0)])
    expected = torch.tensor([[[2.0, 0.0], [0.0, 4.0]], [[15.0, 10.0], [10.0, 15.0]]])
    torch.testing.assert_close(damped(H, 0.5), expected.double())
    torch.testing.assert_close(damped(H, 0.0), H.double(), rtol=0, atol=0)


def test_damping_makes_zero_a_multiple_of_the_identity() -> None:
    torch.testing.assert_close(damped(torch.zeros(3, 3), 0.1), 0.1 * torch.eye(3).double())


def test_inverse_equals_numpy_even_for_a_badly_conditioned_matrix() -> None:
    G = torch.randn(2, 50, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    H = gram(G * torch.tensor([1.0, 1e-1, 1e-2, 1e-3, 1e-4], dtype=torch.float64))
    expected = torch.from_numpy(np.linalg.inv(H.numpy()))
    torch.testing.assert_close(inverse_spd(H), expected, rtol=1e-6, atol=0)


def test_inverse_marks_matrices_without_one_and_spares_the_others() -> None:
    H = torch.stack([torch.eye(2), -torch.eye(2), torch.zeros(2, 2), 4 * torch.eye(2)])
    inverse = inverse_spd(H)
    torch.testing.assert_close(
        inverse[[0, 3]], torch.stack([torch.eye(2), torch.eye(2) / 4]).double()
    )
    assert inverse[1:3].isnan().all()


def test_survivors_are_the_ascending_complement() -> None:
    removed = torch.tensor([[4, 0], [2, 3]])
    assert survivors(removed, 5).tolist() == [[1, 2, 3], [0, 1, 4]]
    assert survivors(removed[0], 5).tolist() == [1, 2, 3]
    assert survivors(torch.empty(0, dtype=torch.int64), 3).tolist() == [0, 1, 2]
