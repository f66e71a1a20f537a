"""A run's folder is found, and its checkpoints and metrics are read and written whole."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from lightning_peft.errors import MissingFile, UserError
from lightning_peft.runs import (
    AtomicCheckpointIO,
    RunLogger,
    belongs_to_run,
    find_last,
    find_restart,
    folder_of,
    interrupted_test,
    next_folder,
    read_checkpoint,
    step_of,
)


def save(path: Path, step: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"global_step": step}, path)
    return path


def test_a_new_run_is_numbered_above_all_others(tmp_path: Path) -> None:
    assert next_folder(tmp_path / "none") == tmp_path / "none" / "version_0"
    for name in ("version_2", "version_10", "version_x", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "version_11").touch()  # a file
    assert next_folder(tmp_path) == tmp_path / "version_11"


def test_the_last_checkpoint_is_that_of_the_newest_run_by_steps(tmp_path: Path) -> None:
    save(tmp_path / "version_0/checkpoints/step=90.ckpt", 90)
    save(tmp_path / "version_1/checkpoints/best.ckpt", 5)
    last = save(tmp_path / "version_1/checkpoints/step=10.ckpt", 10)
    save(tmp_path / "version_1/checkpoints/step=9.ckpt", 9)
    (tmp_path / "version_2").mkdir()
    assert find_last(tmp_path) == last
    assert find_last(tmp_path / "version_1") == last


def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path) -> None:
    good = save(tmp_path / "version_0/checkpoints/step=1.ckpt", 1)
    good.with_name("step=2.ckpt").write_bytes(b"PK\x03\x04abc")
    with pytest.warns(UserWarning, match="step=2.ckpt is cut off or damaged"):
        assert find_last(tmp_path) == good
    good.unlink()
    with (
        pytest.warns(UserWarning, match="cut off"),
        pytest.raises(MissingFile, match="ckpt_path: last was given, but no run under"),
    ):
        find_last(tmp_path)


def test_what_is_no_checkpoint_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(MissingFile, match=r"the checkpoint .*x.ckpt does not exist\."):
        read_checkpoint(tmp_path / "x.ckpt")
    with pytest.raises(UserError, match="is a folder of shards that another program wrote"):
        read_checkpoint(tmp_path)


def test_a_checkpoint_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "checkpoints" / "step=3.ckpt"
    AtomicCheckpointIO().save_checkpoint({"x": torch.arange(3)}, path)
    assert torch.equal(AtomicCheckpointIO().load_checkpoint(path)["x"], torch.arange(3))
    assert list(path.parent.iterdir()) == [path]


def test_a_checkpoint_belongs_to_the_folder_of_its_run(tmp_path: Path) -> None:
    checkpoint = tmp_path / "version_0" / "checkpoints" / "step=4-val=0.5.ckpt"
    assert folder_of(checkpoint) == tmp_path / "version_0"
    assert folder_of(tmp_path / "mine.ckpt") == tmp_path
    assert (step_of(checkpoint), step_of(Path("best.ckpt"))) == (4, -1)
    assert not belongs_to_run(checkpoint)
    (tmp_path / "version_0").mkdir()
    (tmp_path / "version_0" / "config.yaml").touch()
    assert belongs_to_run(checkpoint)


def test_a_test_that_was_cut_off_is_found_where_there_is_no_run(tmp_path: Path) -> None:
    assert interrupted_test(tmp_path) is None
    predictions = tmp_path / "version_3" / "predictions"
    predictions.mkdir(parents=True)
    assert interrupted_test(tmp_path) is None
    (predictions / "task.part0.jsonl").touch()
    assert interrupted_test(tmp_path) == tmp_path / "version_3"
    (tmp_path / "version_3" / "config.yaml").touch()
    assert interrupted_test(tmp_path) is None


def test_a_job_that_was_started_again_goes_on_from_what_it_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "runs" / "version_0"
    last = save(run / "checkpoints" / "step=2.ckpt", 2)
    (run / "config.yaml").touch()
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT", raising=False)
    assert find_restart(run.parent, None) is None  # its first start
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert find_restart(run.parent, None) == last

    attempt = tmp_path / "errors" / "attempt_0"
    attempt.mkdir(parents=True)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(attempt.with_name("attempt_1") / "0/e.json"))
    os.utime(run / "config.yaml", (1, 1))  # a run from before the job
    assert find_restart(run.parent, None) is None


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
