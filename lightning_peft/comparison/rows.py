"""What each run comes to over its seeds, and its difference to the baseline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lightning_peft.comparison.outcomes import Outcomes
from lightning_peft.comparison.plan import Job
from lightning_peft.reports.statistics import bootstrap_interval, is_noise


@dataclass
class Row:
    """One run over its seeds; the last two columns are measured, and differ at every repetition.

    Attributes:
        run: Its name.
        score: Name of the metric.
        rate: The chosen value of ``rates.key``; None without a sweep.
        seeds: With a score.
        failed: Seeds without one.
        mean: Of the score.
        std: Standard deviation over seeds (n - 1); None for one seed.
        low: Lower end of the 95 % interval of the mean.
        high: Its upper end.
        baseline: The run that the difference is taken to; empty for a baseline itself.
        pairs: Seeds that both have.
        difference: Mean over them of this run's score less the baseline's.
        difference_low: Lower end of its 95 % interval.
        difference_high: Its upper end.
        inside_noise: Whether that interval holds zero; None for a baseline, and below five pairs.
        parameters_start: Trainable parameters at the start, averaged over seeds.
        parameters_end: The same at the end.
        off_budget: Seeds that ended outside ``match.tolerance`` of ``match.parameters``; None where
            the run has no such budget.
        adapter_bytes: Size of the adapter's weights on the disk.
        seconds_per_step: Of training, median over seeds.
        peak_memory_mb: Likewise.
    """

    run: str
    score: str
    rate: float | None
    seeds: int
    failed: int
    mean: float | None = None
    std: float | None = None
    low: float | None = None
    high: float | None = None
    baseline: str = ""
    pairs: int | None = None
    difference: float | None = None
    difference_low: float | None = None
    difference_high: float | None = None
    inside_noise: bool | None = None
    parameters_start: int | None = None
    parameters_end: int | None = None
    off_budget: int | None = None
    adapter_bytes: int | None = None
    seconds_per_step: float | None = None
    peak_memory_mb: float | None = None


MEASURED = ("seconds_per_step", "peak_memory_mb")


def make_rows(outcomes: Outcomes, score: str) -> list[Row]:
    """Judge every run by one metric.

    Args:
        outcomes: Of the comparison's jobs.
        score: Name of the metric.

    Returns:
        A row for each run, in the order of the comparison.
    """
    return [_row(outcomes, run, score) for run in outcomes.plan.trees]


def scores_of(outcomes: Outcomes, run: str, score: str) -> dict[int, float]:
    """A run's score by seed.

    Args:
        outcomes: Of the comparison's jobs.
        run: Its name.
        score: Name of the metric.
    """
    found = {job.seed: outcomes.score(job, score) for job in outcomes.chosen(run)}
    return {seed: score for seed, score in found.items() if score is not None}


def _row(outcomes: Outcomes, run: str, score: str) -> Row:
    jobs, scores = outcomes.chosen(run), scores_of(outcomes, run, score)
    settled, rate = outcomes.choice(run)
    # Without a rate that could be trained there is no job to count.
    lost = settled and not jobs
    failed = len(outcomes.plan.comparison.seeds) if lost else _count_failed(outcomes, jobs)
    row = Row(run, score, rate, len(scores), failed)
    baseline = outcomes.plan.baseline_of(run)
    if scores:
        values = list(scores.values())
        row.mean = float(np.mean(values))
        row.std = float(np.std(values, ddof=1)) if len(values) > 1 else None
        row.low, row.high = bootstrap_interval(values)
    if run != baseline:
        row.baseline = baseline
        _compare(row, scores, scores_of(outcomes, baseline, score))
    done = [outcomes.found[job] for job in jobs if job.seed in scores]
    for name, attribute in (("start", "parameters_start"), ("end", "parameters_end")):
        setattr(row, attribute, _mean([getattr(outcome, name) for outcome in done]))
    match = outcomes.plan.comparison.match
    if match and match.parameters is not None and run not in match.leave:
        row.off_budget = sum(1 for job in jobs if outcomes.off_budget(job))
    row.adapter_bytes = _mean([outcome.adapter_bytes for outcome in done])
    for name in MEASURED:
        found = [getattr(outcome, name) for outcome in done if getattr(outcome, name) is not None]
        setattr(row, name, float(np.median(found)) if found else None)
    return row


def _count_failed(outcomes: Outcomes, jobs: Sequence[Job]) -> int:
    return sum(1 for job in jobs if outcomes.failure(job))


def _compare(row: Row, scores: dict[int, float], others: dict[int, float]) -> None:
    gaps = [scores[seed] - others[seed] for seed in scores if seed in others]
    row.pairs = len(gaps)
    if gaps:
        interval = bootstrap_interval(gaps)
        row.difference = float(np.mean(gaps))
        row.difference_low, row.difference_high = interval
        row.inside_noise = is_noise(interval, len(gaps))


def _mean(values: Sequence[int | None]) -> int | None:
    found = [value for value in values if value is not None]
    return round(float(np.mean(found))) if found else None
