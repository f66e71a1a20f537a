"""Recovery against constrained solvers and least squares on samples."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

from lightning_peft.pruning import (
    activation_recovery,
    bounded,
    damped,
    gradient_recovery,
    gradient_score,
    gram,
    sparsegpt_score,
    survivors,
)


def random_quadratic(d: int, r: int, seed: int, *lead: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return W, G `(..., d, r)` and a well-conditioned H `(..., r, r)`."""
    generator = torch.Generator().manual_seed(seed)
    W, G = torch.randn(2, *lead, d, r, generator=generator, dtype=torch.float64)
    root = torch.randn(*lead, 2 * r, r, generator=generator, dtype=torch.float64)
    return W, G, gram(root) / r


def model(delta: np.ndarray, G: np.ndarray, H: np.ndarray) -> float:
    return float((G * delta).sum() + 0.5 * np.trace(delta @ H @ delta.T))


@pytest.mark.parametrize(("d", "r"), [(3, 8), (8, 3), (1, 6)])
@pytest.mark.parametrize("removed", [[1], [2, 0]])
def test_gradient_recovery_solves_the_kkt_system_of_all_elements(d, r, removed) -> None:
    W, G, H = random_quadratic(d, r, seed=d)
    hessian = np.kron(np.eye(d), H.numpy())  # over the rows of δ, laid end to end
    rows = [i * r + j for i in range(d) for j in removed]
    E = np.eye(d * r)[:, rows]
    system = np.block([[hessian, E], [E.T, np.zeros((len(rows), len(rows)))]])
    right = np.concatenate([-G.numpy().ravel(), -W.numpy().ravel()[rows]])
    expected = np.linalg.solve(system, right)[: d * r].reshape(d, r)
    delta = gradient_recovery(W, G, H, torch.tensor(removed))
    np.testing.assert_allclose(delta.numpy(), expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize("removed", [[2], [3, 0]])
def test_gradient_recovery_is_what_a_generic_solver_finds(removed) -> None:
    d, r = 2, 4
    W, G, H = (t.numpy() for t in random_quadratic(d, r, seed=3))
    solution = minimize(
        lambda x: model(x.reshape(d, r), G, H),
        np.zeros(d * r),
        jac=lambda x: (G + x.reshape(d, r) @ H).ravel(),
        constraints={"type": "eq", "fun": lambda x: (x.reshape(d, r) + W)[:, removed].ravel()},
        method="SLSQP",
        options={"ftol": 1e-15, "maxiter": 1000},
    )
    assert solution.success
    delta = gradient_recovery(*(torch.from_numpy(t) for t in (W, G, H)), torch.tensor(removed))
    np.testing.assert_allclose(delta.numpy(), solution.x.reshape(d, r), atol=1e-6, rtol=0)


def test_removing_one_is_the_single_component_formula() -> None:
    W, G, H = random_quadratic(5, 4, seed=4)
    inverse, j = np.linalg.inv(H.numpy()), 2
    newton = G.numpy() @ inverse
    column = W.numpy()[:, j] - newton[:, j]
    expected = -newton - np.outer(column, inverse[j]) / inverse[j, j]
    delta = gradient_recovery(W, G, H, torch.tensor([j]))
    np.testing.assert_allclose(delta.numpy(), expected, atol=1e-12)


def test_the_recovered_value_exceeds_the_free_minimum_by_the_score() -> None:
    generator = torch.Generator().manual_seed(5)
    B, grad_B = torch.randn(2, 6, 3, generator=generator, dtype=torch.float64)
    A, grad_A = torch.randn(2, 3, 8, generator=generator, dtype=torch.float64)
    eye = torch.eye(3, dtype=torch.float64)
    score = gradient_score(B, grad_B, A, grad_A, eps=1e-2)
    for j in range(3):
        gap = 0.0
        for W, G in ((B, grad_B), (A.mT, grad_A.mT)):
            H = gram(G) + 1e-2 * eye
            recovered = gradient_recovery(W, G, H, torch.tensor([j]))
            free = gradient_recovery(W, G, H, torch.empty(0, dtype=torch.int64))
            G_, H_ = G.numpy(), H.numpy()
            gap += model(recovered.numpy(), G_, H_) - model(free.numpy(), G_, H_)
        assert score[j].item() == pytest.approx(gap, rel=1e-9)


def test_the_transpose_recovers_A() -> None:
    W, G, H = random_quadratic(5, 3, seed=6)
    removed = torch.tensor([0, 2])
    A, grad_A = W.mT, G.mT
    delta = gradient_recovery(A.mT, grad_A.mT, H, removed).mT
    assert delta.shape == A.shape
    assert torch.equal((A + delta)[removed], torch.zeros(2, 5, dtype=torch.float64))
    stationary = grad_A + H @ delta  # zero for the survivors, whose rows are free
    torch.testing.assert_close(stationary[1], torch.zeros(5, dtype=torch.float64))


def test_without_the_first_order_term_the_gradient_plays_no_part() -> None:
    W, G, H = random_quadratic(5, 4, seed=7)
    removed = torch.tensor([1, 3])
    delta = gradient_recovery(W, G, H, removed, first_order=False)
    torch.testing.assert_close(delta, gradient_recovery(W, 0 * G, H, removed))


def test_removed_columns_become_exactly_zero_in_low_precision() -> None:
    W, G, H = random_quadratic(6, 4, seed=8)
    removed = torch.tensor([0, 3])
    for dtype in (torch.float32, torch.bfloat16):
        W_ = W.to(dtype).requires_grad_()
        for delta in (
            gradient_recovery(W_, G.to(dtype), H, removed),
            gradient_recovery(W_, G.to(dtype), H, removed, max_ratio=0.1),
            activation_recovery(W_, H, removed),
        ):
            assert delta.dtype == dtype
            assert not delta.requires_grad
            assert (W_ + delta)[:, removed].count_nonzero() == 0
            assert (W_ + delta)[:, [1, 2]].count_nonzero() == 12


def test_a_large_change_is_scaled_to_the_bound_and_a_small_one_is_left() -> None:
    W, G, H = random_quadratic(6, 4, seed=9)
    removed, kept = torch.tensor([0, 3]), [1, 2]
    exact = gradient_recovery(W, G, H, removed)
    limit = 0.1 * torch.linalg.matrix_norm(W[:, removed])
    delta = gradient_recovery(W, G, H, removed, max_ratio=0.1)
    torch.testing.assert_close(torch.linalg.matrix_norm(delta[:, kept]), limit)
    ratio = delta[:, kept] / exact[:, kept]
    torch.testing.assert_close(ratio, ratio[0, 0].expand(6, 2))
    assert 0 < ratio[0, 0] < 1
    assert torch.equal(delta[:, removed], -W[:, removed])
    torch.testing.assert_close(bounded(exact, W, removed, 1e6), exact, rtol=0, atol=0)
    plain = bounded(exact, W, removed, 0.0)
    assert torch.equal(plain[:, kept], torch.zeros(6, 2, dtype=torch.float64))


def test_the_bound_is_each_matrix_own() -> None:
    W, G, H = random_quadratic(5, 4, 10, 2)
    W[1] *= 1e6  # nothing to scale down here
    removed = torch.tensor([[0], [2]])
    exact, delta = (gradient_recovery(W, G, H, removed, max_ratio=m) for m in (None, 10.0))
    torch.testing.assert_close(delta[1], exact[1])
    W[0] = 0  # nothing was removed, nothing may change
    delta = gradient_recovery(W, G, H, removed, max_ratio=10.0)
    assert delta[0].count_nonzero() == 0


def test_without_a_gradient_damping_makes_recovery_plain_removal() -> None:
    W = torch.randn(5, 4, dtype=torch.float64)
    zero = torch.zeros_like(W)
    delta = gradient_recovery(W, zero, damped(gram(zero), 0.1), torch.tensor([1]))
    expected = torch.zeros_like(W)
    expected[:, 1] = -W[:, 1]
    torch.testing.assert_close(delta, expected)


def test_a_batch_equals_one_by_one() -> None:
    W, G, H = random_quadratic(5, 4, 11, 2, 3)
    removed = torch.tensor([[[0, 1], [3, 2], [1, 3]], [[2, 0], [0, 3], [2, 1]]])
    for recover in (
        lambda W, G, H, removed: gradient_recovery(W, G, H, removed),
        lambda W, G, H, removed: gradient_recovery(W, G, H, removed, max_ratio=0.3),
        lambda W, G, H, removed: activation_recovery(W, H, removed, 0.1),
    ):
        batch = recover(W, G, H, removed)
        shared = recover(W, G, H, removed[0, 0])
        for i in range(2):
            for j in range(3):
                one = recover(W[i, j], G[i, j], H[i, j], removed[i, j])
                torch.testing.assert_close(batch[i, j], one, rtol=1e-12, atol=1e-12)
                one = recover(W[i, j], G[i, j], H[i, j], removed[0, 0])
                torch.testing.assert_close(shared[i, j], one, rtol=1e-12, atol=1e-12)


def sampled_activations(r: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return correlated z `(tokens, r)` and C = E[z zᵀ]."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(r, r, generator=generator, dtype=torch.float64)
    z = torch.randn(64, r, generator=generator, dtype=torch.float64) @ mix
    return z, z.T @ z / 64


@pytest.mark.parametrize("removed", [[2], [4, 1]])
def test_activation_recovery_is_least_squares_on_the_output(removed) -> None:
    z, C = sampled_activations(r=5, seed=12)
    B = torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    kept = survivors(torch.tensor(removed), 5)
    new = B + activation_recovery(B, C, torch.tensor(removed), damping=0.0)
    expected = torch.linalg.lstsq(z[:, kept], z @ B.T).solution.T  # (d_out, r - k)
    torch.testing.assert_close(new[:, kept], expected, atol=1e-6, rtol=0)
    assert torch.equal(new[:, removed], torch.zeros(7, len(removed), dtype=torch.float64))
    if len(removed) == 1:
        error = (z @ (B - new).T).square().sum(1).mean()
        torch.testing.assert_close(sparsegpt_score(B, C, damping=0.0)[removed[0]], error)


def test_activation_damping_is_ridge_on_the_change() -> None:
    z, C = sampled_activations(r=5, seed=13)
    B = torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    removed, kept = torch.tensor([0, 3]), torch.tensor([1, 2, 4])
    ridge = 0.1 * z.square().mean()  # the mean over tokens and components is mean(diag C)
    rows = torch.cat([z[:, kept] / 8, ridge.sqrt() * torch.eye(3, dtype=torch.float64)])
    target = torch.cat(
        [z[:, removed] @ B[:, removed].T / 8, torch.zeros(3, 7, dtype=torch.float64)]
    )
    expected = torch.linalg.lstsq(rows, target).solution.T
    delta = activation_recovery(B, C, removed, damping=0.1)
    torch.testing.assert_close(delta[:, kept], expected, atol=1e-9, rtol=0)


def test_activation_recovery_is_gradient_recovery_on_the_second_moment() -> None:
    _, C = sampled_activations(r=5, seed=14)
    B = torch.randn(7, 5, dtype=torch.float64)
    removed = torch.tensor([4, 2])
    expected = gradient_recovery(B, 0 * B, damped(C, 0.01), removed)
    torch.testing.assert_close(activation_recovery(B, C, removed, 0.01), expected)


def test_a_duplicate_component_is_taken_over_without_loss() -> None:
    z, _ = sampled_activations(r=3, seed=15)
    z = z[:, [0, 1, 2, 1]]  # C is singular, C_KK is not
    B = torch.randn(6, 4, dtype=torch.float64)
    new = B + activation_recovery(B, z.T @ z / 64, torch.tensor([3]), damping=0.0)
    torch.testing.assert_close(z @ new.T, z @ B.T)
