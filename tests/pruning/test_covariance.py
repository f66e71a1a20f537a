"""Covariance in batches against all rows at once, and directions against the singular vectors."""

from __future__ import annotations

import functools

import pytest
import torch

from lightning_peft.pruning.covariance import moments, principal, together


@pytest.mark.parametrize("sizes", [(12,), (1, 11), (7, 1, 1, 30)])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_batches_together_have_the_moments_of_all_rows(sizes, offset) -> None:
    torch.manual_seed(0)
    rows = torch.randn(sum(sizes), 5, dtype=torch.float64) @ torch.randn(5, 5).double() + offset
    single = rows.float()
    found = functools.reduce(together, [moments(part) for part in single.split(list(sizes))])
    exact = single.double()
    assert found.n == len(rows)
    torch.testing.assert_close(found.mean.double(), exact.mean(0), rtol=1e-6, atol=1e-6)
    expected = torch.cov(exact.T, correction=0) * len(rows)
    # Sums of squares would have an error of 1e8 · 1e-7 here.
    error = (found.scatter.double() - expected).abs().max() / expected.abs().max()
    assert error < (1e-5 if offset == 0 else 5e-3)


def test_half_precision_is_summed_in_single() -> None:
    assert moments(torch.randn(3, 2).bfloat16()).scatter.dtype == torch.float32


def test_directions_are_the_right_singular_vectors_of_centred_rows() -> None:
    torch.manual_seed(0)
    rows = torch.randn(40, 6).double() * torch.arange(1, 7) + 3
    shares, directions = principal(moments(rows).scatter)
    _, values, right = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
    torch.testing.assert_close(shares, values**2 / (values**2).sum())
    torch.testing.assert_close((directions @ right.T).abs(), torch.eye(6).double())
    largest = directions.abs().argmax(1)
    assert (directions[torch.arange(6), largest] > 0).all()


def test_no_variance_has_no_shares() -> None:
    shares, directions = principal(torch.zeros(3, 3))
    assert not shares.any()
    torch.testing.assert_close(directions @ directions.T, torch.eye(3).double())
