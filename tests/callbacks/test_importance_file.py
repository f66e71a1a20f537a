"""Rows of importance.csv, and the file over interruptions."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from lightning_peft.callbacks.importance_file import append_rows, begin_file, importance_rows
from lightning_peft.callbacks.measurement import Seen
from lightning_peft.reports.records import IMPORTANCE, read_table

HEADER = ",".join(IMPORTANCE) + "\n"


def seen(total: float, tokens: int = 2, rank: int = 4) -> Seen:
    return Seen(torch.tensor(total), tokens, rank)


def test_rows_hold_means_and_shares_within_the_kind() -> None:
    rows = importance_rows(7, {"l.0.q": seen(2.0), "l.1.q": seen(6.0, rank=3), "l.0.v": seen(5.0)})
    assert [row["layer"] for row in rows] == ["l.0.q", "l.1.q", "l.0.v"]
    assert [row["importance"] for row in rows] == [1.0, 3.0, 2.5]
    assert [row["share"] for row in rows] == [0.25, 0.75, 1.0]
    assert [row["rank"] for row in rows] == [4, 3, 4]
    assert {(row["step"], row["measure"]) for row in rows} == {(7, "output")}


def test_shares_are_nan_where_one_importance_is_not_finite() -> None:
    rows = importance_rows(0, {"l.0.q": seen(math.inf), "l.1.q": seen(1.0)}, "weight")
    assert all(math.isnan(row["share"]) for row in rows)
    assert [row["importance"] for row in rows] == [math.inf, 0.5]
    assert rows[0]["measure"] == "weight"


def test_rows_of_two_steps_are_read_back(tmp_path: Path) -> None:
    path = tmp_path / "importance.csv"
    begin_file(path, 0)
    rows = [importance_rows(step, {"l.0.q": seen(1.0 + step)}) for step in (0, 5)]
    for of_step in rows:
        append_rows(path, of_step)
    assert read_table(path, IMPORTANCE) == [*rows[0], *rows[1]]


def test_a_file_goes_on_without_later_steps_and_cut_lines(tmp_path: Path) -> None:
    path = tmp_path / "importance.csv"
    early, late = "0,a.q,q,4,0.5,1,output\n", "4,a.q,q,4,0.25,1,output\n"
    path.write_text(HEADER + early + late + "4,b.q,q,4,0.1")
    begin_file(path, 4)
    assert path.read_text() == HEADER + early
    path.write_text(HEADER + early + "2,a.q,q,4,0.1")
    begin_file(path, 4)
    assert path.read_text() == HEADER + early
    begin_file(path, 0)
    assert path.read_text() == HEADER


def test_a_file_killed_while_its_first_line_was_written_is_begun_anew(tmp_path: Path) -> None:
    path = tmp_path / "importance.csv"
    path.write_text("step,lay")
    begin_file(path, 4)
    assert path.read_text() == HEADER
