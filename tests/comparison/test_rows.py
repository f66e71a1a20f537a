"""A run over its seeds is one row: mean, interval, and the difference paired by seed."""

from __future__ import annotations

import pytest

from lightning_peft.comparison.outcomes import Outcomes
from lightning_peft.comparison.plan import Job, Plan
from lightning_peft.comparison.rows import make_rows
from lightning_peft.comparison.worker import write_result
from lightning_peft.reports.statistics import bootstrap_interval


def test_a_row_holds_mean_interval_and_the_paired_difference(
    plan: Plan, scores: dict[str, list[float]]
) -> None:
    base, better = make_rows(Outcomes(plan), "test/average")
    assert (base.rate, base.seeds, base.failed) == (0.01, 5, 0)
    assert base.mean == pytest.approx(0.5)
    assert base.std == pytest.approx(0.0790569415)
    assert (base.low, base.high) == bootstrap_interval(scores["base"])
    assert (base.baseline, base.difference) == ("", None)
    gaps = [b - a for a, b in zip(*scores.values(), strict=True)]
    assert better.difference == pytest.approx(sum(gaps) / 5)
    assert (better.difference_low, better.difference_high) == bootstrap_interval(gaps)
    # The seeds spread by 0.2, but every seed gains about the same.
    assert better.inside_noise is False
    assert (better.parameters_start, better.parameters_end, better.adapter_bytes) == (200, 100, 123)
    assert better.seconds_per_step == 2.25  # the median


def test_where_every_rate_failed_the_run_has_no_score_and_nothing_is_due(plan: Plan) -> None:
    for rate in (0.1, 0.01):
        write_result(plan.folder_of(Job("better", rate, 0)), "failed", "the loss is nan")
    outcomes = Outcomes(plan)
    assert list(outcomes.due()) == []
    row = make_rows(outcomes, "test/average")[1]
    assert (row.seeds, row.failed, row.mean) == (0, 5, None)
