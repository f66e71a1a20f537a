"""How a comparison stands: what each job came to, which value was chosen, and what is due."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_peft.comparison.plan import Job, Plan
from lightning_peft.comparison.worker import read_result

WEIGHTS = ("*.safetensors", "*.bin", "*.pt")


@dataclass(frozen=True)
class Outcome:
    """What one job came to.

    Attributes:
        status: ``fitted``, ``done`` or ``failed``.
        reason: Of a failure.
        metrics: The last of validation, and those of the test.
        start: Trainable parameters at the start.
        end: Trainable parameters at the end.
        adapter_bytes: Of the weights' files in ``adapter/`` or ``model/``; None without either.
        seconds_per_step: Of training, without validation.
        peak_memory_mb: Of the process, or of the GPU.
        folder: The run's.
    """

    status: str
    reason: str = ""
    metrics: dict[str, float] = field(default_factory=dict)
    start: int | None = None
    end: int | None = None
    adapter_bytes: int | None = None
    seconds_per_step: float | None = None
    peak_memory_mb: float | None = None
    folder: Path | None = None


def read_outcome(folder: Path) -> Outcome | None:
    """What the files of a job's folder tell; None where it has not come to an end.

    Args:
        folder: The job's.
    """
    result = read_result(folder)
    if not result:
        return None
    found = sorted(folder.glob("version_*/run.json"))
    if not found:
        return Outcome(result["status"], result.get("reason", ""))
    record: dict[str, Any] = json.loads(found[-1].read_text())
    run, parameters = found[-1].parent, record.get("parameters") or {}
    return Outcome(
        result["status"],
        result.get("reason", ""),
        record.get("metrics") or {},
        parameters.get("start"),
        parameters.get("end"),
        _bytes(run),
        record.get("seconds_per_step"),
        record.get("peak_memory_mb"),
        run,
    )


def _bytes(run: Path) -> int | None:
    files = [
        path for name in ("adapter", "model") for end in WEIGHTS for path in (run / name).glob(end)
    ]
    return sum(path.stat().st_size for path in files) if files else None


class Outcomes:
    """The outcomes of all jobs that came to an end.

    Args:
        plan: The comparison.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.found: dict[Job, Outcome] = {}
        for job in self.all_jobs(plan):
            self.read(job)

    @staticmethod
    def all_jobs(plan: Plan) -> list[Job]:
        """Every job that may become due."""
        comparison = plan.comparison
        sweeps = [job for run in plan.trees for job in plan.sweep(run)]
        rest = [
            Job(run, rate, seed)
            for run in plan.trees
            for rate in plan.rates_of(run)
            for seed in comparison.seeds
        ]
        return list(dict.fromkeys([*sweeps, *rest]))

    def read(self, job: Job) -> None:
        """Read a job's files anew."""
        outcome = read_outcome(self.plan.folder_of(job))
        if outcome is not None:
            self.found[job] = outcome

    # Choosing a rate.

    @property
    def tests(self) -> bool:
        """Whether runs are judged by a test."""
        also = self.plan.comparison.also
        return any(name.startswith("test/") for name in (self.plan.score, *also))

    def rates_of(self, run: str) -> dict[float, float]:
        """The metric of each rate of a sweep, averaged over its seeds; NaN where a job failed."""
        rates = self.plan.comparison.rates
        sums: dict[float, list[float]] = {}
        for job in self.plan.sweep(run):
            outcome = self.found.get(job)
            if outcome is None or job.rate is None or rates is None:
                continue
            failed = outcome.status == "failed" or not outcome.metrics
            value = math.nan if failed else outcome.metrics.get(str(rates.choose_by), math.nan)
            sums.setdefault(job.rate, []).append(value)
        return {rate: sum(values) / len(values) for rate, values in sums.items()}

    def choice(self, run: str) -> tuple[bool, float | None]:
        """Whether a run's rate is settled, and it; None where there is none, or all failed."""
        rates = self.plan.comparison.rates
        if rates is None:
            return True, None
        if any(job not in self.found for job in self.plan.sweep(run)):
            return False, None
        means = {rate: mean for rate, mean in self.rates_of(run).items() if not math.isnan(mean)}
        best = max if rates.best == "highest" else min
        return True, best(means, key=lambda rate: means[rate]) if means else None

    def chosen(self, run: str) -> list[Job]:
        """The jobs by which a run is judged, or none while its rate is not settled."""
        settled, rate = self.choice(run)
        if not settled or (rate is None and self.plan.comparison.rates is not None):
            return []
        return [Job(run, rate, seed) for seed in self.plan.comparison.seeds]

    # What is left.

    def due(self) -> Iterator[tuple[Job, bool]]:
        """Jobs that are left as far as they are known, and whether they are tested."""
        for run in self.plan.trees:
            sweep = [job for job in self.plan.sweep(run) if job not in self.found]
            yield from ((job, False) for job in sweep)
            for job in self.chosen(run):
                outcome = self.found.get(job)
                if outcome is None or (self.tests and outcome.status == "fitted"):
                    yield job, self.tests

    def progress(self) -> tuple[int, int]:
        """How many jobs are done, and how many there are."""
        return len(self.found), self.plan.count()

    def score(self, job: Job, name: str | None = None) -> float | None:
        """What a job is judged by; None where it has not come so far, or failed.

        Args:
            job: The job.
            name: Of a metric; the comparison's score when None.
        """
        outcome, name = self.found.get(job), name or self.plan.score
        return outcome.metrics.get(name) if outcome and self.ok(job) else None

    def ok(self, job: Job) -> bool:
        """Whether a job was trained, and tested where runs are."""
        outcome = self.found.get(job)
        return outcome is not None and outcome.status == ("done" if self.tests else "fitted")

    def failure(self, job: Job) -> str:
        """Why a job has no score; empty where it has one, or is not done."""
        outcome = self.found.get(job)
        if outcome is None:
            return ""
        if outcome.status == "failed":
            return outcome.reason or "failed"
        if self.ok(job) and self.score(job) is None:
            names = ", ".join(sorted(outcome.metrics))
            return f"its metrics hold no {self.plan.score}; there are {names}"
        return ""

    def off_budget(self, job: Job) -> str:
        """Where a job's trainable parameters at its end are not the budget's; else empty."""
        match, outcome = self.plan.comparison.match, self.found.get(job)
        if match is None or match.parameters is None or job.run in match.leave:
            return ""
        if outcome is None or outcome.status == "failed":
            return ""
        if outcome.end is None:
            return "how many parameters trained at its end is not in its record"
        if abs(outcome.end - match.parameters) <= match.tolerance * match.parameters:
            return ""
        return (
            f"{outcome.end:,} parameters train at its end, outside {match.tolerance:.0%} of "
            f"match.parameters = {match.parameters:,}"
        )

    def sentence(self, job: Job) -> str:
        """How a job stands, for the log."""
        failure, outcome = self.failure(job), self.found.get(job)
        if failure or outcome is None:
            return f"failed: {failure}"
        rates, score = self.plan.comparison.rates, self.score(job)
        name, value = self.plan.score, score
        if score is None:
            name = str(rates.choose_by) if rates else "val_loss"
            value = outcome.metrics.get(name)
        said = outcome.status if value is None else f"{name} {value:.4f}"
        off = self.off_budget(job)
        return f"{said}, but {off}" if off else said
