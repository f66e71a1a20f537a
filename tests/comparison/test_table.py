"""What a comparison's jobs came to becomes one table."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from lightning_peft.comparison.outcomes import Outcomes
from lightning_peft.comparison.plan import Job, Plan
from lightning_peft.comparison.rows import make_rows
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
