"""Each step has one row, also after a resumption."""

from __future__ import annotations

from pathlib import Path

from lightning_peft.runs import RunLogger


def test_metrics_of_one_step_share_a_row_and_tests_have_none(tmp_path: Path) -> None:
    logger = RunLogger(tmp_path)
    logger.log_metrics({"loss": 1 / 3, "epoch": 0}, 0)
    logger.log_metrics({"loss": 0.25}, 1)
    logger.log_metrics({"val_loss": 0.5}, 1)
    logger.log_metrics({"test/average": 1.0}, 2)
    logger.log_metrics({"epoch": 1}, 2)
    assert (tmp_path / "metrics.csv").read_text().splitlines() == [
        "step,loss,epoch,val_loss",
        "0,0.333333333,0,",
        "1,0.25,,0.5",
    ]


def test_a_resumed_run_writes_each_step_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("step,loss\n0,1\n1,2\n2,3\n3")  # the last line was cut off
    logger = RunLogger(tmp_path)
    logger.go_on_from(2)
    logger.log_metrics({"loss": 5}, 2)
    assert path.read_text().splitlines() == ["step,loss", "0,1", "1,2", "2,5"]
