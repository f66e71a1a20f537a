"""Each criterion is the score that it names, and each recovery the change that it names."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import Tensor

from lightning_peft.pruning import (
    activation_recovery,
    damped,
    gradient_recovery,
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
from lightning_peft.pruning.criteria import (
    CRITERIA,
    WATCH_ACTIVATIONS,
    Criterion,
    Matrices,
    activation_change,
    gradient_change,
)

N, D_OUT, D_IN, R = 3, 7, 9, 5
EPS, DAMPING = 1e-3, 0.2
SCORES = {
    "gradient": lambda m: gradient_score(m.B, m.grad_B, m.A, m.grad_A, EPS),
    "llm_pruner_element1": lambda m: llm_pruner_element1(m.B, m.grad_B, m.A, m.grad_A),
    "llm_pruner_element2": lambda m: llm_pruner_element2(m.B, m.grad_B, m.A, m.grad_A),
    "llm_pruner_taylor2": lambda m: llm_pruner_taylor2(m.B, m.grad_B, m.A, m.grad_A),
    "wanda": lambda m: wanda_score(m.B, m.C),
    "sparsegpt": lambda m: sparsegpt_score(m.B, m.C, DAMPING),
    "magnitude": lambda m: magnitude_score(m.B, m.A),
    "random": lambda m: random_score(m.B),
}


@pytest.fixture
def matrices() -> Matrices:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(N, *shape, generator=generator)

    z, g_B, g_A = draw(40, R), draw(20, D_OUT, R)[:, 0], draw(20, R, D_IN)[:, 0]
    return Matrices(
        B=draw(D_OUT, R),
        A=draw(R, D_IN),
        grad_B=draw(D_OUT, R),
        grad_A=draw(R, D_IN),
        C=z.mT @ z / 40,
        H_B=gram(g_B),
        H_A=gram(g_A.mT),
    )


@pytest.mark.parametrize("name", SCORES)
def test_a_criterion_is_the_score_that_it_names(name, matrices) -> None:
    torch.manual_seed(1)
    score = CRITERIA[name](matrices, EPS, DAMPING)
    torch.manual_seed(1)
    assert torch.equal(score, SCORES[name](matrices))
    assert score.shape == (N, R)
    assert len(set(score.flatten().tolist())) == N * R


def test_every_name_has_its_criterion() -> None:
    assert list(CRITERIA) == list(get_args(Criterion)) == list(SCORES)
    assert set(WATCH_ACTIVATIONS) == {"wanda", "sparsegpt"}


def test_eps_and_damping_are_those_of_the_scores_that_have_them(matrices) -> None:
    moved = {
        name
        for name in set(SCORES) - {"random"}
        if not torch.equal(
            CRITERIA[name](matrices, EPS, DAMPING), CRITERIA[name](matrices, 9.0, 9.0)
        )
    }
    assert moved == {"gradient", "sparsegpt"}


@pytest.mark.parametrize("name", sorted(WATCH_ACTIVATIONS))
def test_what_was_not_watched_cannot_be_scored(name, matrices) -> None:
    bare = Matrices(matrices.B, matrices.A, matrices.grad_B, matrices.grad_A)
    with pytest.raises(AssertionError):
        CRITERIA[name](bare, EPS, DAMPING)
    assert CRITERIA["gradient"](bare, EPS, DAMPING).shape == (N, R)


def test_a_selection_is_of_all_that_is_known(matrices) -> None:
    some = matrices.select([2, 0])
    for key in ("B", "A", "grad_B", "grad_A", "C", "H_B", "H_A"):
        value = getattr(matrices, key)
        assert torch.equal(getattr(some, key), torch.stack([value[2], value[0]]))
    bare = Matrices(matrices.B, matrices.A, matrices.grad_B, matrices.grad_A).select([1])
    assert (bare.C, bare.H_B, bare.H_A) == (None, None, None)
    whole, one = (CRITERIA["gradient"](m, EPS, DAMPING) for m in (matrices, bare))
    torch.testing.assert_close(one[0], whole[1])


GONE = torch.tensor([[0, 3], [1, 2], [2, 4]])


def test_the_activation_recovery_changes_b_by_the_formula_and_a_not(matrices) -> None:
    change_B, change_A = activation_change(matrices, GONE, DAMPING)
    assert not change_A.any()
    assert change_A.shape == matrices.A.shape
    for i in range(N):
        expected = activation_recovery(matrices.B[i], matrices.C[i], GONE[i], DAMPING)
        torch.testing.assert_close(change_B[i], expected)


def test_the_gradient_recovery_changes_both_by_the_formula(matrices) -> None:
    m, ratio = matrices, 0.6
    change_B, change_A = gradient_change(m, GONE, DAMPING, ratio)
    for i in range(N):
        B = gradient_recovery(m.B[i], m.grad_B[i], damped(m.H_B[i], DAMPING), GONE[i], ratio)
        A = gradient_recovery(m.A[i].T, m.grad_A[i].T, damped(m.H_A[i], DAMPING), GONE[i], ratio)
        torch.testing.assert_close(change_B[i], B)
        torch.testing.assert_close(change_A[i], A.T)
        assert B.any()
        assert A.any()
