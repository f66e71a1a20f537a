"""Scores against loops, a KKT solve in numpy, sampled activations and autograd."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_peft.pruning import (
    gradient_score,
    gram,
    llm_pruner_element1,
    llm_pruner_element2,
    llm_pruner_taylor2,
    magnitude_score,
    random_score,
    sparsegpt_score,
    wanda_score,
)

D_OUT, D_IN, R = 7, 9, 4
LLM_PRUNER = {
    llm_pruner_element1: lambda wg: abs(wg),
    llm_pruner_element2: lambda wg: wg**2,
    llm_pruner_taylor2: lambda wg: abs(wg - 0.5 * wg**2),
}


def random_pair(*lead: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Return B, grad_B, A, grad_A."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(D_OUT, R), (D_OUT, R), (R, D_IN), (R, D_IN)]
    return [torch.randn(*lead, *s, generator=generator, dtype=dtype) for s in shapes]


def quadratic_minimum(W: np.ndarray, G: np.ndarray, H: np.ndarray, removed: list[int]) -> float:
    """Return min ⟨G, δ⟩ + ½ tr(δ H δᵀ) under δ e_j = −W_j, row by row, from the KKT system."""
    r, k = H.shape[0], len(removed)
    E = np.eye(r)[:, removed]
    system = np.block([[H, E], [E.T, np.zeros((k, k))]])
    value = 0.0
    for w, g in zip(W, G, strict=True):
        x = np.linalg.solve(system, np.concatenate([-g, -w[removed]]))[:r]
        value += g @ x + 0.5 * x @ H @ x
    return value


@pytest.mark.parametrize("eps", [1e-6, 0.3])
def test_gradient_score_is_the_gap_between_the_two_minima(eps: float) -> None:
    B, grad_B, A, grad_A = random_pair()
    expected = []
    for j in range(R):
        gap = 0.0
        for W, G in ((B, grad_B), (A.T, grad_A.T)):
            W_, G_ = W.numpy(), G.numpy()
            H = G_.T @ G_ + eps * np.eye(R)
            gap += quadratic_minimum(W_, G_, H, [j]) - quadratic_minimum(W_, G_, H, [])
        expected.append(gap)
    score = gradient_score(B, grad_B, A, grad_A, eps)
    assert score.numpy() == pytest.approx(np.array(expected), rel=1e-6)


def test_gradient_score_equals_its_formula_by_loops() -> None:
    B, grad_B, A, grad_A = random_pair(seed=1)
    B_, G_B, A_, G_A = (t.numpy() for t in (B, grad_B, A, grad_A))
    inverse_B = np.linalg.inv(G_B.T @ G_B + 1e-6 * np.eye(R))
    inverse_A = np.linalg.inv(G_A @ G_A.T + 1e-6 * np.eye(R))
    full, plain = [], []
    for j in range(R):
        of_B = B_[:, j] - (G_B @ inverse_B)[:, j]
        of_A = A_[j] - (inverse_A @ G_A)[j]
        full.append(0.5 * of_B @ of_B / inverse_B[j, j] + 0.5 * of_A @ of_A / inverse_A[j, j])
        norms = B_[:, j] @ B_[:, j] / inverse_B[j, j] + A_[j] @ A_[j] / inverse_A[j, j]
        plain.append(0.5 * norms)
    assert gradient_score(B, grad_B, A, grad_A).numpy() == pytest.approx(np.array(full), rel=1e-9)
    without = gradient_score(B, grad_B, A, grad_A, first_order=False)
    assert without.numpy() == pytest.approx(np.array(plain), rel=1e-9)


def test_gradient_score_takes_a_given_second_order_matrix() -> None:
    B, grad_B, A, grad_A = random_pair(seed=2)
    H_B, H_A = gram(grad_B), gram(grad_A.mT)
    given = gradient_score(B, grad_B, A, grad_A, H_B=H_B, H_A=H_A)
    torch.testing.assert_close(given, gradient_score(B, grad_B, A, grad_A), rtol=0, atol=0)
    eye = torch.eye(R, dtype=torch.float64)
    expected = torch.zeros(R, dtype=torch.float64)
    for W, G, H in ((B, grad_B, 2 * H_B), (A.mT, grad_A.mT, 3 * H_A)):
        inverse = torch.linalg.inv(H + 1e-6 * eye)
        expected += 0.5 * (W - G @ inverse).square().sum(0) / inverse.diagonal()
    other = gradient_score(B, grad_B, A, grad_A, H_B=2 * H_B, H_A=3 * H_A)
    torch.testing.assert_close(other, expected)


def test_gradient_score_without_a_gradient_is_the_norm_in_units_of_eps() -> None:
    B, grad_B, A, grad_A = random_pair(seed=3)
    score = gradient_score(B, 0 * grad_B, A, 0 * grad_A, eps=1e-3)
    expected = 0.5e-3 * (B.square().sum(0) + A.square().sum(1))
    torch.testing.assert_close(score, expected)


def test_gradient_score_depends_on_the_scale_of_the_loss_as_on_the_scale_of_the_weights() -> None:
    B, grad_B, A, grad_A = random_pair(seed=4)
    c = 64.0
    scaled_loss = gradient_score(B, c * grad_B, A, c * grad_A, eps=c**2 * 1e-6)
    scaled_weights = gradient_score(c * B, grad_B, c * A, grad_A, eps=1e-6)
    torch.testing.assert_close(scaled_loss, scaled_weights)
    orders = {
        tuple(gradient_score(B, c * grad_B, A, c * grad_A).argsort().tolist())
        for c in (1e-3, 1.0, 1e3)
    }
    assert len(orders) > 1


def test_gradient_score_without_eps_is_blind_to_how_B_and_A_share_their_scale() -> None:
    B, grad_B, A, grad_A = random_pair(seed=5)
    rescaled = gradient_score(8 * B, grad_B / 8, A / 8, 8 * grad_A, eps=0.0)
    torch.testing.assert_close(rescaled, gradient_score(B, grad_B, A, grad_A, eps=0.0))


def test_a_gradient_that_is_not_finite_spoils_only_its_own_matrix() -> None:
    B, grad_B, A, grad_A = random_pair(2, seed=6)
    clean = gradient_score(B, grad_B, A, grad_A)
    grad_B[0, 0, 0] = torch.inf
    score = gradient_score(B, grad_B, A, grad_A)
    assert score[0].isnan().all()
    torch.testing.assert_close(score[1], clean[1])


@pytest.mark.parametrize("criterion", LLM_PRUNER, ids=lambda f: f.__name__)
def test_llm_pruner_equals_loops(criterion) -> None:
    B, grad_B, A, grad_A = random_pair(seed=7)
    element = LLM_PRUNER[criterion]
    expected = torch.zeros(R, dtype=torch.float64)
    for j in range(R):
        for i in range(D_OUT):
            expected[j] += element(B[i, j] * grad_B[i, j])
        for i in range(D_IN):
            expected[j] += element(A[j, i] * grad_A[j, i])
    torch.testing.assert_close(criterion(B, grad_B, A, grad_A), expected)


def test_llm_pruner_scales_with_the_loss_as_documented() -> None:
    B, grad_B, A, grad_A = random_pair(seed=8)
    scaled, plain = (B, 4 * grad_B, A, 4 * grad_A), (B, grad_B, A, grad_A)
    torch.testing.assert_close(llm_pruner_element1(*scaled), 4 * llm_pruner_element1(*plain))
    torch.testing.assert_close(llm_pruner_element2(*scaled), 16 * llm_pruner_element2(*plain))
    # |4wg − 8(wg)²| is neither 4 nor 16 times |wg − ½(wg)²|.
    ratio = llm_pruner_taylor2(*scaled) / llm_pruner_taylor2(*plain)
    assert (ratio.max() - ratio.min()) > 0.1


def sampled_activations(tokens: int = 50) -> tuple[Tensor, Tensor]:
    """Return correlated z `(tokens, r)` and C = E[z zᵀ]."""
    generator = torch.Generator().manual_seed(11)
    mix = torch.randn(R, R, generator=generator, dtype=torch.float64)
    z = torch.randn(tokens, R, generator=generator, dtype=torch.float64) @ mix
    return z, z.T @ z / tokens


def test_wanda_is_the_root_mean_square_of_the_component_output() -> None:
    B = random_pair(seed=9)[0]
    z, C = sampled_activations()
    expected = [torch.outer(z[:, j], B[:, j]).square().sum(1).mean().sqrt() for j in range(R)]
    torch.testing.assert_close(wanda_score(B, C), torch.stack(expected))


def test_sparsegpt_is_the_output_error_after_least_squares() -> None:
    B = random_pair(seed=10)[0]
    z, C = sampled_activations()
    for j in range(R):
        kept = [i for i in range(R) if i != j]
        best = torch.linalg.lstsq(z[:, kept], z @ B.T).solution
        error = (z @ B.T - z[:, kept] @ best).square().sum(1).mean()
        torch.testing.assert_close(sparsegpt_score(B, C, damping=0.0)[j], error)


def test_sparsegpt_damping_is_relative_to_the_mean_diagonal() -> None:
    B = random_pair(seed=12)[0]
    _, C = sampled_activations()
    inverse = torch.linalg.inv(C + 0.1 * C.diagonal().mean() * torch.eye(R, dtype=C.dtype))
    expected = torch.stack([B[:, j] @ B[:, j] / inverse[j, j] for j in range(R)])
    torch.testing.assert_close(sparsegpt_score(B, C, damping=0.1), expected)
    torch.testing.assert_close(sparsegpt_score(B, 1e6 * C, damping=0.1), 1e6 * expected)


def test_sparsegpt_without_any_activation_is_the_norm() -> None:
    B = random_pair(seed=13)[0]
    score = sparsegpt_score(B, torch.zeros(R, R), damping=0.01)
    torch.testing.assert_close(score, 0.01 * B.square().sum(0))


def test_magnitude_is_the_norm_of_the_component_and_blind_to_how_scale_is_shared() -> None:
    B, _, A, _ = random_pair(seed=14)
    expected = [torch.linalg.matrix_norm(torch.outer(B[:, j], A[j])) for j in range(R)]
    torch.testing.assert_close(magnitude_score(B, A), torch.stack(expected))
    torch.testing.assert_close(magnitude_score(3 * B, A / 3), magnitude_score(B, A))


def test_random_score_repeats_under_one_seed_and_follows_the_global_stream() -> None:
    B = random_pair(3)[0]
    first = random_score(B, torch.Generator().manual_seed(5))
    assert first.shape == (3, R)
    assert torch.equal(first, random_score(B, torch.Generator().manual_seed(5)))
    assert not torch.equal(first, random_score(B, torch.Generator().manual_seed(6)))
    torch.manual_seed(5)
    assert torch.equal(first, random_score(B))
    assert not torch.equal(first, random_score(B))


@pytest.mark.parametrize(
    "criterion",
    [gradient_score, *LLM_PRUNER, lambda B, gB, A, gA: magnitude_score(B, A)]
    + [
        lambda B, gB, A, gA: wanda_score(B, gram(gB)),
        lambda B, gB, A, gA: sparsegpt_score(B, gram(gB)),
    ],
)
def test_a_batch_equals_one_by_one(criterion) -> None:
    B, grad_B, A, grad_A = random_pair(2, 3, seed=17)
    batch = criterion(B, grad_B, A, grad_A)
    assert batch.shape == (2, 3, R)
    for i in range(2):
        for j in range(3):
            one = criterion(B[i, j], grad_B[i, j], A[i, j], grad_A[i, j])
            torch.testing.assert_close(batch[i, j], one, rtol=1e-12, atol=1e-12)


def test_scores_are_float64_without_a_graph_whatever_the_parameters() -> None:
    pair = [t.requires_grad_() for t in random_pair(seed=18, dtype=torch.float32)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        score = gradient_score(*pair)
    assert score.dtype == torch.float64
    assert not score.requires_grad
    expected = gradient_score(*(t.detach().double() for t in pair))
    torch.testing.assert_close(score, expected, rtol=0, atol=0)
