"""What a comparison's jobs came to becomes one table."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from lightning_peft.comparison.outcomes import Outcomes
from lightning_peft.comparison.pictures import save_pictures
from lightning_peft.comparison.plan import Job, Plan
from lightning_peft.comparison.rows import make_rows
from lightning_peft.comparison.schema import Comparison, Rates
from lightning_peft.comparison.table import write_table
from lightning_peft.comparison.worker import write_result
from lightning_peft.reports.statistics import bootstrap_interval

SEEDS = [0, 1, 2, 3, 4]
SCORES = {"base": [0.5, 0.6, 0.4, 0.55, 0.45], "better": [0.7, 0.82, 0.6, 0.76, 0.67]}


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
def plan(tmp_path: Path) -> Plan:
    """Two runs that were swept over two rates, and tested with five seeds."""
    made = Comparison(
        {"base": {}, "better": {}},
        str(tmp_path),
        seeds=SEEDS,
        rates=Rates([0.1, 0.01], choose_by="val_loss", best="lowest"),
        curve="val_loss",
    )
    plan = Plan(made, {"base": {}, "better": {}})
    for run, scores in SCORES.items():
        # The worse rate would have the better test score, which nobody may look at.
        leave(plan, Job(run, 0.1, 0), "fitted", val_loss=2.0)
        for seed, score in zip(SEEDS, scores, strict=True):
            leave(plan, Job(run, 0.01, seed), "done", val_loss=1.0, test__average=score)
    return plan


def test_a_row_holds_mean_interval_and_the_paired_difference(plan: Plan) -> None:
    base, better = make_rows(Outcomes(plan), "test/average")
    assert (base.rate, base.seeds, base.failed) == (0.01, 5, 0)
    assert base.mean == pytest.approx(0.5)
    assert base.std == pytest.approx(0.0790569415)
    assert (base.low, base.high) == bootstrap_interval(SCORES["base"])
    assert (base.baseline, base.difference) == ("", None)
    gaps = [b - a for a, b in zip(*SCORES.values(), strict=True)]
    assert better.difference == pytest.approx(sum(gaps) / 5)
    assert (better.difference_low, better.difference_high) == bootstrap_interval(gaps)
    # The seeds spread by 0.2, but every seed gains about the same.
    assert better.inside_noise is False
    assert (better.parameters_start, better.parameters_end, better.adapter_bytes) == (200, 100, 123)
    assert better.seconds_per_step == 2.25  # the median


def test_the_rate_is_chosen_on_validation(plan: Plan) -> None:
    outcomes = Outcomes(plan)
    assert outcomes.rates_of("base") == {0.1: 2.0, 0.01: 1.0}
    assert outcomes.choice("base") == (True, 0.01)
    plan.comparison.rates = Rates([0.1, 0.01], choose_by="val_loss", best="highest")
    assert Outcomes(plan).choice("base") == (True, 0.1)


def test_a_rate_that_failed_is_not_chosen_and_one_that_is_due_is_awaited(plan: Plan) -> None:
    folder = plan.folder_of(Job("base", 0.01, 0))
    write_result(folder, "failed", "the loss is nan")
    assert Outcomes(plan).choice("base") == (True, 0.1)
    (folder / "result.json").unlink()
    assert Outcomes(plan).choice("base") == (False, None)
    assert list(Outcomes(plan).due()) == [(Job("base", 0.01, 0), False)]


def test_where_every_rate_failed_the_run_has_no_score_and_nothing_is_due(plan: Plan) -> None:
    for rate in (0.1, 0.01):
        write_result(plan.folder_of(Job("better", rate, 0)), "failed", "the loss is nan")
    outcomes = Outcomes(plan)
    assert list(outcomes.due()) == []
    row = make_rows(outcomes, "test/average")[1]
    assert (row.seeds, row.failed, row.mean) == (0, 5, None)


def test_a_failed_seed_is_left_out_and_named(plan: Plan, tmp_path: Path) -> None:
    write_result(plan.folder_of(Job("better", 0.01, 3)), "failed", "a | reason")
    outcomes = Outcomes(plan)
    base, better = make_rows(outcomes, "test/average")
    assert (better.seeds, better.failed, better.pairs) == (4, 1, 4)
    assert better.inside_noise is None
    text = write_table(outcomes, tmp_path)
    assert "too few seeds to tell" in text
    assert "- better/rate=0.01/seed=3: a | reason" in text


def test_a_score_that_no_run_has_says_what_there_is(plan: Plan) -> None:
    plan.comparison.score = "test/avarage"
    outcomes = Outcomes(plan)
    reason = outcomes.failure(Job("base", 0.01, 0))
    assert reason == "its metrics hold no test/avarage; there are test/average, val_loss"


def test_seeds_that_are_fitted_but_not_tested_are_due_for_their_test(plan: Plan) -> None:
    write_result(plan.folder_of(Job("base", 0.01, 0)), "fitted")
    assert list(Outcomes(plan).due()) == [(Job("base", 0.01, 0), True)]


def test_files_hold_every_row_and_metric(plan: Plan, tmp_path: Path) -> None:
    plan.comparison.also = ["val_loss"]
    write_table(Outcomes(plan), tmp_path)
    with (tmp_path / "results.csv").open() as file:
        rows: list[dict[str, Any]] = list(csv.DictReader(file))
    found = [(row["run"], row["score"], row["mean"]) for row in rows]
    assert found == [
        ("base", "test/average", "0.5"),
        ("better", "test/average", "0.71"),
        ("base", "val_loss", "1"),
        ("better", "val_loss", "1"),
    ]
    with (tmp_path / "seeds.csv").open() as file:
        seeds = list(csv.DictReader(file))
    assert [row["judged"] for row in seeds].count("true") == 10
    assert len(seeds) == 12
    latex = (tmp_path / "results.tex").read_text()
    assert r"better & 0.01 & 5 & 0.710 $\pm$ " in latex
    assert r"\_" not in latex.splitlines()[2]
    assert latex.count(r"\begin{tabular}") == latex.count(r"\end{tabular}") == 2


def test_pictures_are_drawn_of_what_is_there(plan: Plan, tmp_path: Path) -> None:
    names = [path.name for path in save_pictures(Outcomes(plan), tmp_path)]
    assert names == ["score_by_parameters.png", "score_by_seed.png", "curves.png"]
