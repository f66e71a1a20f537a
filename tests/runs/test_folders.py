"""A run's folder is claimed by making it, and held as long as the run lives."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger

from lightning_peft.errors import UserError
from lightning_peft.runs import RunFolder, claim_folder, folder_of, run_folder
from lightning_peft.runs.folders import (
    belongs_to_run,
    interrupted_test,
    is_first_process,
    next_folder,
)


def test_a_new_run_is_numbered_above_all_names(tmp_path: Path) -> None:
    assert next_folder(tmp_path / "none") == tmp_path / "none" / "version_0"
    for name in ("version_2", "version_10", "version_x", "other"):
        (tmp_path / name).mkdir()
    assert next_folder(tmp_path) == tmp_path / "version_11"
    (tmp_path / "version_11").touch()  # a file
    (tmp_path / "version_12").symlink_to(tmp_path / "nowhere")
    assert next_folder(tmp_path) == tmp_path / "version_13"


def test_many_that_claim_at_once_get_a_folder_each(tmp_path: Path) -> None:
    with ThreadPoolExecutor(16) as pool:
        claimed = list(pool.map(lambda _: claim_folder(tmp_path / "runs"), range(64)))
    assert sorted(c.path.name for c in claimed) == sorted(f"version_{n}" for n in range(64))
    assert all(c.path.is_dir() for c in claimed)


def test_a_start_that_came_to_nothing_leaves_nothing(tmp_path: Path) -> None:
    claimed = claim_folder(tmp_path / "a" / "b")
    (claimed.path / "metrics.csv").touch()
    claimed.give_up()
    assert list(tmp_path.iterdir()) == []


def test_a_start_that_came_to_nothing_leaves_others_alone(tmp_path: Path) -> None:
    first, second = claim_folder(tmp_path / "a"), claim_folder(tmp_path / "a")
    (second.path / "checkpoints").mkdir()
    (second.path / "checkpoints" / "step=1.ckpt").touch()
    first.give_up()
    second.give_up()
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["version_1"]


def test_a_file_where_a_folder_should_be_is_the_systems_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        claim_folder(tmp_path / "file")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="not a POSIX system")
@pytest.mark.parametrize(
    ("theirs", "ours", "sentence"),
    [
        ("alone", False, r"the run in .* is at work in process \d+ on .*; wait until it has ended"),
        ("alone", True, "is at work in process"),
        ("shared", False, "is at work in"),
        ("shared", True, None),
    ],
)
def test_a_run_at_work_is_refused_until_its_process_ends(
    tmp_path: Path, at_work: Any, theirs: str, ours: bool, sentence: str | None
) -> None:
    with at_work(tmp_path, shared=theirs == "shared"):
        if sentence:
            with pytest.raises(UserError, match=sentence):
                RunFolder(tmp_path, shared=ours)
        else:
            RunFolder(tmp_path, shared=ours).release()
    RunFolder(tmp_path, shared=ours).release()


@pytest.mark.parametrize(
    ("environment", "first"),
    [
        ({}, True),
        ({"LOCAL_RANK": "0"}, True),
        ({"LOCAL_RANK": "1"}, False),
        ({"NODE_RANK": "1"}, False),
        ({"RANK": "0", "LOCAL_RANK": "0"}, True),
        ({"RANK": "4", "LOCAL_RANK": "0"}, False),
        ({"SLURM_PROCID": "3"}, False),
    ],
)
def test_the_first_process_of_a_job_is_told_by_its_launcher(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], first: bool
) -> None:
    for name in ("RANK", "NODE_RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert is_first_process() == first


def test_a_checkpoint_belongs_to_the_folder_of_its_run(tmp_path: Path) -> None:
    checkpoint = tmp_path / "version_0" / "checkpoints" / "step=4-val=0.5.ckpt"
    assert folder_of(checkpoint) == tmp_path / "version_0"
    assert folder_of(tmp_path / "mine.ckpt") == tmp_path
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


def test_a_run_lies_in_its_loggers_folder_or_the_root(tmp_path: Path) -> None:
    plain = Trainer(accelerator="cpu", logger=False, default_root_dir=tmp_path / "root")
    assert run_folder(plain) == tmp_path / "root"
    logged = Trainer(accelerator="cpu", logger=CSVLogger(tmp_path, "run", version=3))
    assert run_folder(logged) == tmp_path / "run" / "version_3"
    trial = Trainer(accelerator="cpu", fast_dev_run=True, default_root_dir=tmp_path)
    assert run_folder(trial) is None
