"""What the tests of comparisons share."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lightning_peft.comparison.plan import Job, Plan
from lightning_peft.comparison.schema import Comparison, Rates
from lightning_peft.comparison.worker import write_result

SEEDS = [0, 1, 2, 3, 4]


@pytest.fixture
def scores() -> dict[str, list[float]]:
    """The test's scores of two runs, by seed."""
    return {"base": [0.5, 0.6, 0.4, 0.55, 0.45], "better": [0.7, 0.82, 0.6, 0.76, 0.67]}


def leave(plan: Plan, job: Job, status: str, reason: str = "", **metrics: float) -> None:
    """Write what a job's run would leave."""
    folder = plan.folder_of(job)
    write_result(folder, status, reason)
    if status == "failed":
        return
    run = folder / "version_0"
    (run / "adapter").mkdir(parents=True)
    (run / "adapter/adapter_model.safetensors").write_bytes(b"x" * 123)
    record = {
        "metrics": {key.replace("__", "/"): value for key, value in metrics.items()},
        "parameters": {"start": 200, "end": 100},
        "seconds_per_step": 0.25 + job.seed,
        "peak_memory_mb": 500.0,
    }
    (run / "run.json").write_text(json.dumps(record))
    rows = [f"{step},{metrics['val_loss'] / (step + 1)}" for step in (0, 10)]
    (run / "metrics.csv").write_text("\n".join(["step,val_loss", *rows, ""]))


@pytest.fixture
def plan(tmp_path: Path, scores: dict[str, list[float]]) -> Plan:
    """Two runs that were swept over two rates, and tested with five seeds."""
    made = Comparison(
        {"base": {}, "better": {}},
        str(tmp_path),
        seeds=SEEDS,
        rates=Rates([0.1, 0.01], choose_by="val_loss", best="lowest"),
        score="test/average",
        curve="val_loss",
    )
    plan = Plan(made, {"base": {}, "better": {}})
    for run, tested in scores.items():
        # The worse rate would have the better test score, which nobody may look at.
        leave(plan, Job(run, 0.1, 0), "fitted", val_loss=2.0)
        for seed, score in zip(SEEDS, tested, strict=True):
            leave(plan, Job(run, 0.01, seed), "done", val_loss=1.0, test__average=score)
    return plan
