"""What a comparison's jobs came to becomes one table."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from lightning_peft.comparison.outcomes import Outcomes
from lightning_peft.comparison.plan import Job, Plan
from lightning_peft.comparison.rows import make_rows
from lightning_peft.comparison.schema import Match
from lightning_peft.comparison.table import write_table
from lightning_peft.comparison.worker import write_result


def test_a_failed_seed_is_left_out_and_named(plan: Plan, tmp_path: Path) -> None:
    write_result(plan.folder_of(Job("better", 0.01, 3)), "failed", "a | reason")
    outcomes = Outcomes(plan)
    base, better = make_rows(outcomes, "test/average")
    assert (better.seeds, better.failed, better.pairs) == (4, 1, 4)
    assert better.inside_noise is None
    text = write_table(outcomes, tmp_path)
    assert "too few seeds to tell" in text
    assert "- better/rate=0.01/seed=3: a | reason" in text


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


def test_a_count_outside_the_budget_is_marked_in_the_table_and_named_under_it(
    plan: Plan, tmp_path: Path
) -> None:
    plan.comparison.match = Match(parameters=155_648, leave=["base"])
    outcomes = Outcomes(plan)
    base, better = make_rows(outcomes, "test/average")
    assert (base.off_budget, better.off_budget) == (None, 5)
    text = write_table(outcomes, tmp_path)
    assert "| 200 | 100 (outside the budget) |" in text
    assert text.count("outside the budget") == 1
    said = "100 parameters train at its end, outside 5% of match.parameters = 155,648"
    assert f"- better/rate=0.01/seed=4: {said}" in text
    assert "- base/" not in text
    with (tmp_path / "results.csv").open() as file:
        assert [row["off_budget"] for row in csv.DictReader(file)] == ["", "5"]
    with (tmp_path / "seeds.csv").open() as file:
        assert {row["off_budget"] for row in csv.DictReader(file)} == {"", said}
    plan.comparison.match = Match(parameters=100)
    assert "utside the budget" not in write_table(Outcomes(plan), tmp_path)


def test_what_was_said_of_the_plan_stands_under_the_table(plan: Plan, tmp_path: Path) -> None:
    plan.notes = ["score: test/average is not a metric of base."]
    assert "score: test/average is not a metric of base." in write_table(Outcomes(plan), tmp_path)
