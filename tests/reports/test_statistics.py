"""Intervals over seeds against scipy, and how often they hold the true mean."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from lightning_peft.reports.statistics import bootstrap_interval, is_noise, student_quantile


@pytest.mark.parametrize("freedom", [1, 2, 4, 9, 30])
@pytest.mark.parametrize("p", [0.9, 0.975, 0.995])
def test_students_quantile_is_scipys(p: float, freedom: int) -> None:
    assert student_quantile(p, freedom) == pytest.approx(stats.t.ppf(p, freedom), rel=1e-4)


def test_plain_interval_is_scipys_percentile_bootstrap() -> None:
    values = np.random.default_rng(1).normal(size=12)
    low, high = bootstrap_interval(values.tolist(), expanded=False)
    theirs = stats.bootstrap((values,), np.mean, method="percentile", rng=2).confidence_interval
    assert (low, high) == pytest.approx(tuple(theirs), abs=0.03)


def test_expanded_interval_of_ten_values_is_about_as_wide_as_students() -> None:
    values = np.random.default_rng(3).normal(size=10)
    low, high = bootstrap_interval(values.tolist())
    width = 2 * stats.t.ppf(0.975, 9) * values.std(ddof=1) / np.sqrt(10)
    assert high - low == pytest.approx(width, rel=0.1)
    plain = bootstrap_interval(values.tolist(), expanded=False)
    assert low < plain[0] < plain[1] < high


def test_interval_is_the_same_at_every_call_and_of_one_value_is_the_value() -> None:
    assert bootstrap_interval([1.0, 2.0, 4.0]) == bootstrap_interval([1.0, 2.0, 4.0])
    assert bootstrap_interval([2.5]) == (2.5, 2.5)


@pytest.mark.parametrize(
    ("interval", "count", "noise"),
    [
        ((-0.1, 0.2), 5, True),
        ((0.1, 0.2), 5, False),
        ((-0.2, -0.1), 9, False),
        ((0.1, 0.2), 4, None),
    ],
)
def test_noise_is_an_interval_that_holds_zero_and_needs_five_seeds(
    interval: tuple[float, float], count: int, noise: bool | None
) -> None:
    assert is_noise(interval, count) is noise
