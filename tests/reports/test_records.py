"""The tables of a run, read and written."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_peft.reports.records import (
    DECISIONS,
    csv_text,
    read_if_there,
    read_metrics,
    read_table,
    series,
    source,
)


def test_values_have_their_columns_types_and_a_cut_line_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "decisions.csv"
    path.write_text("step,layer,event,rank\n3,a.q,removed,7\n5,a.v,rem")
    assert read_table(path, DECISIONS) == [
        {"step": 3, "layer": "a.q", "event": "removed", "rank": 7}
    ]


@pytest.mark.parametrize("line", ["x,a.q,removed,7", "3,a.q", "3,a.q,removed,"])
def test_a_line_of_another_form_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "decisions.csv"
    path.write_text(f"step,layer,event,rank\n1,a.q,removed,8\n{line}\n")
    with pytest.raises(
        ValueError, match=r"decisions\.csv, line 3: expected step, layer, event, rank"
    ):
        read_table(path, DECISIONS)


def test_a_table_that_is_not_there_has_no_rows(tmp_path: Path) -> None:
    assert read_if_there(tmp_path / "decisions.csv", DECISIONS) == []
    (tmp_path / "decisions.csv").write_text("step,layer,event,rank\n1,a,b,2\n")
    assert len(read_if_there(tmp_path / "decisions.csv", DECISIONS)) == 1


def test_written_rows_are_read_back(tmp_path: Path) -> None:
    path, columns = tmp_path / "table.csv", {"name": str, "value": float}
    rows = [{"name": "a,b", "value": 1 / 3, "other": 1}, {"name": "c", "value": 2.0}]
    text = csv_text(rows, columns)
    assert text == '"a,b",0.333333333\nc,2\n'
    path.write_text("name,value\n" + text)
    assert [row["name"] for row in read_table(path, columns)] == ["a,b", "c"]


def test_metrics_hold_what_stands_in_a_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("step,train_loss,val_loss\n0,2.0,\n9,,1.5\n10,1.")
    assert read_metrics(path) == [{"step": 0.0, "train_loss": 2.0}, {"step": 9.0, "val_loss": 1.5}]
    path.write_text("step,train_loss\n0,bad\n")
    with pytest.raises(ValueError, match=r"metrics\.csv is not a table of numbers"):
        read_metrics(path)


def test_a_series_is_one_metric_by_step() -> None:
    rows = [{"step": 9.0, "a": 1.0}, {"step": 3.0, "a": 2.0}, {"a": 5.0}, {"step": 4.0, "b": 1.0}]
    assert series(rows, "a") == [(3.0, 2.0), (9.0, 1.0)]
    assert series(rows, "c") == []


def test_a_missing_file_is_named_with_what_makes_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"run\.json does not exist; a fit writes it\."):
        source(tmp_path, "run.json", "a fit writes it")
    (tmp_path / "run.json").touch()
    assert source(tmp_path, "run.json", "a fit writes it") == tmp_path / "run.json"
