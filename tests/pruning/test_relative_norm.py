"""Relative norms of components against whole matrices, and the late budget by its formula."""

from __future__ import annotations

import pytest
import torch

from lightning_peft.pruning.relative_norm import late_budget, relative_norms
from lightning_peft.pruning.sensitivity import cubic_budget


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_relative_norms_are_those_of_whole_matrices(dtype) -> None:
    torch.manual_seed(0)
    B, c, A = (torch.randn(*size, dtype=dtype) for size in ((7, 4), (4,), (4, 5)))
    c[2] = 0
    parts = torch.einsum("ik,k,kj->kij", B, c, A)
    expected = parts.norm(dim=(1, 2)) / (parts.sum(0).norm() + 1e-8)
    found = relative_norms(B, c, A)
    assert found.dtype == dtype
    assert found[2] == 0
    assert found.sum() > 1
    torch.testing.assert_close(found, expected)


def test_components_that_cancel_are_worth_much_and_scales_of_zero_nothing() -> None:
    B, A = torch.ones(3, 2), torch.ones(2, 3)
    close = relative_norms(B, torch.tensor([1.0, -0.999]), A)
    torch.testing.assert_close(close, torch.tensor([1000.0, 999.0]), rtol=1e-3, atol=0)
    assert torch.equal(relative_norms(B, torch.zeros(2), A), torch.zeros(2))


def test_the_late_budget_loses_little_at_first_and_all_by_the_end() -> None:
    found = [late_budget(step, 120, 80, 10, 5, 35) for step in range(40)]
    assert found[:11] == [120] * 11
    assert found[30:] == [80] * 10
    # p = 1/2: an eighth of the 40 that leave are gone, where AdaLoRA has lost seven eighths.
    assert found[20] == 115
    assert cubic_budget(20, 120, 80, 10, 5, 35) == 85
    assert found[25] == 120 - int(40 * 0.75**3)
    assert found == sorted(found, reverse=True)
