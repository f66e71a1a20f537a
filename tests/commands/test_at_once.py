"""Runs that start at the same moment are as many whole runs, and a run at work is left alone."""

from __future__ import annotations

import csv
import json
import os
import sys
import time
from pathlib import Path

import pytest
import yaml
from at_once import begin, end, end_one, small_fit, write
from safetensors.torch import load_file

from lightning_peft.runs import read_checkpoint

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="not a POSIX system")
STEPS = 8
WORK = "is at work in "  # and which process, once that one has written it down


def whole(run: Path, seed: int) -> bytes:
    """Check that a folder is one run's, from the settings to the adapter; its adapter's bytes."""
    assert yaml.safe_load((run / "config.yaml").read_text())["seed_everything"] == seed
    record = json.loads((run / "run.json").read_text())
    assert (record["seed"], record["steps"], record["status"]) == (seed, STEPS, "finished")
    rows = list(csv.DictReader((run / "metrics.csv").open()))
    assert [row["step"] for row in rows] == [str(step) for step in range(STEPS)]
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names[-2:] == ["step=6.ckpt", f"step={STEPS}.ckpt"]
    saved = read_checkpoint(run / "checkpoints" / f"step={STEPS}.ckpt")
    assert saved["settings"]["seed_everything"] == seed
    adapter = load_file(run / "adapter" / "adapter_model.safetensors")
    assert adapter.keys()
    assert len(adapter) == len(saved["state_dict"])
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


def pairs_of_fits(base: Path, folder: Path, pairs: int) -> None:
    alone = {}
    for seed in (1, 2):
        config = write(folder / f"{seed}.yaml", small_fit(base, folder / f"alone{seed}"))
        words = ["fit", "--config", config, "--seed_everything", seed]
        assert end(begin(words, folder / "log.txt")) == 0, (folder / "log.txt").read_text()
        alone[seed] = whole(folder / f"alone{seed}" / "version_0", seed)
    config = write(folder / "pair.yaml", small_fit(base, folder / "runs"))
    for pair in range(pairs):
        at = time.time() + 0.2
        words = ["fit", "--config", config, "--seed_everything"]
        children = [begin([*words, seed], folder / f"log{seed}.txt", at) for seed in (1, 2)]
        assert [end(child) for child in children] == [0, 0]
        names = (f"version_{2 * pair}", f"version_{2 * pair + 1}")
        runs = [folder / "runs" / name for name in names]
        by_seed = {json.loads((run / "run.json").read_text())["seed"]: run for run in runs}
        assert {seed: whole(run, seed) for seed, run in by_seed.items()} == alone
    assert len(list((folder / "runs").iterdir())) == 2 * pairs


def pairs_of_resumes(base: Path, folder: Path, pairs: int) -> None:
    go = folder / "go"
    waits = {"class_path": "at_once.Wait", "init_args": {"file": str(go)}}
    config = small_fit(base, folder / "runs", max_steps=4, callbacks=[waits])
    config["model"]["init_args"]["lr_scheduler_type"] = "constant"
    file = write(folder / "begin.yaml", config)
    longer = ["--trainer.max_steps", STEPS, "--resume_with_changes", "true"]
    for pair in range(pairs):
        go.touch()
        assert end(begin(["fit", "--config", file], folder / "log.txt")) == 0
        go.unlink()
        run = folder / "runs" / f"version_{pair}"
        path, at = run / "checkpoints" / "step=4.ckpt", time.time() + 0.2
        words = ["fit", "--config", file, "--ckpt_path", path, *longer]
        logs = [folder / f"log{i}.txt" for i in (1, 2)]
        children = [begin(words, log, at) for log in logs]
        # The one that holds the run trains only when the other has ended.
        refused, code = end_one(children)
        go.touch()
        assert (code, end(children[1 - refused])) == (2, 0), [log.read_text() for log in logs]
        assert f"error: the run in {run} {WORK}" in logs[refused].read_text()
        whole(run, seed=0)
        changes = json.loads((run / "run.json").read_text())["changes"]
        assert changes == [
            {"from_step": 4, "key": "trainer.max_steps", "old": 4, "new": STEPS},
        ]


def test_two_fits_at_once_are_two_whole_runs(base: Path, tmp_path: Path) -> None:
    pairs_of_fits(base, tmp_path, pairs=1)


def test_two_resumes_at_once_are_one_run_and_a_refusal(base: Path, tmp_path: Path) -> None:
    pairs_of_resumes(base, tmp_path, pairs=1)


@pytest.mark.long
def test_ten_pairs_of_fits_are_twenty_whole_runs(base: Path, tmp_path: Path) -> None:
    pairs_of_fits(base, tmp_path, pairs=10)


@pytest.mark.long
def test_ten_pairs_of_resumes_are_ten_refusals(base: Path, tmp_path: Path) -> None:
    pairs_of_resumes(base, tmp_path, pairs=10)


def test_two_tests_of_a_run_at_once_are_one_and_a_refusal(base: Path, tmp_path: Path) -> None:
    config = write(tmp_path / "a.yaml", small_fit(base, tmp_path / "runs"))
    assert end(begin(["fit", "--config", config], tmp_path / "log.txt")) == 0
    words = ["test", "--config", config, "--ckpt_path", "last", "--data.test_size", 64]
    logs, at = [tmp_path / f"log{i}.txt" for i in (1, 2)], time.time() + 0.2
    children = [begin(words, log, at) for log in logs]
    codes = [end(child) for child in children]
    assert sorted(codes) == [0, 2], [log.read_text() for log in logs]
    said = logs[codes.index(2)].read_text()
    assert "subtraction.part0 is being written by another test; wait for its end" in said
    run = tmp_path / "runs" / "version_0"
    assert len((run / "predictions" / "subtraction.jsonl").read_text().splitlines()) == 64
    record = json.loads((run / "run.json").read_text())
    assert record["status"] == "finished"
    assert "test/subtraction" in " ".join(record["metrics"])


def test_a_resume_under_other_settings_is_refused_and_changes_nothing(
    base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightning_peft.cli import main

    monkeypatch.setattr(sys, "argv", ["lightning-peft"])
    config = write(tmp_path / "a.yaml", small_fit(base, tmp_path / "runs"))
    main(["fit", "--config", str(config)])
    run = tmp_path / "runs" / "version_0"
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for word, sentence in {
        "--model.optimizer.lr=1e-5": "model.optimizer.lr: the run was begun with 0.01, this",
        "--model.optimizer.weight_decay=0.5": "model.optimizer.weight_decay: the run was begun",
        "--data.batch_size=2": "data.batch_size: the run was begun with 4, this command says 2",
        "--trainer.accumulate_grad_batches=2": "trainer.accumulate_grad_batches: the run was",
        "--model.lr_scheduler_type=constant": "model.lr_scheduler_type: the run was begun",
        "--seed_everything=7": "seed_everything: the run was begun with 0, this command says 7",
        "--model.adapter.p=0.25": "model.adapter.p: the run was begun with 0.5, this command",
    }.items():
        capfd.readouterr()
        with pytest.raises(SystemExit):
            main(["fit", "--config", str(config), "--ckpt_path", "last", word])
        assert sentence in capfd.readouterr().err
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_changed_rate_is_what_runs_and_what_is_written(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the step on that ``run.json`` names."""
    from lightning_peft.cli import main

    monkeypatch.setattr(sys, "argv", ["lightning-peft"])
    settings = small_fit(base, tmp_path / "runs", max_steps=4)
    settings["model"]["init_args"]["lr_scheduler_type"] = "constant"
    config = write(tmp_path / "a.yaml", settings)
    main(["fit", "--config", str(config)])
    changed = ["--model.optimizer.lr=0.003", "--model.optimizer.weight_decay=0.5"]
    changed += ["--trainer.max_steps=8", "--resume_with_changes=true"]
    main(["fit", "--config", str(config), "--ckpt_path", "last", *changed])
    run = tmp_path / "runs" / "version_0"
    rates = [float(row["lr"]) for row in csv.DictReader((run / "metrics.csv").open())]
    assert rates == [0.01] * 4 + [0.003] * 4
    group = read_checkpoint(run / "checkpoints" / "step=8.ckpt")["optimizer_states"][0]
    assert group["param_groups"][0]["weight_decay"] == 0.5
    written = yaml.safe_load((run / "config.yaml").read_text())
    assert written["model"]["init_args"]["optimizer"]["init_args"]["lr"] == 0.003
    assert written["resume_with_changes"] is False
    changes = json.loads((run / "run.json").read_text())["changes"]
    assert {change["key"]: (change["from_step"], change["new"]) for change in changes} == {
        "model.optimizer.lr": (4, 0.003),
        "model.optimizer.weight_decay": (4, 0.5),
        "trainer.max_steps": (4, 8),
    }


def test_a_trial_announces_and_leaves_nothing(
    base: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from lightning_peft.cli import main

    monkeypatch.setattr(sys, "argv", ["lightning-peft"])
    config = write(tmp_path / "a.yaml", small_fit(base, tmp_path / "runs"))
    before = sorted(tmp_path.rglob("*"))
    for command in ("fit", "predict"):
        main([command, "--config", str(config), "--trainer.fast_dev_run", "true"])
    assert sorted(tmp_path.rglob("*")) == before
    assert "run folder: none, since fast_dev_run keeps nothing" in caplog.text
    assert "run.json" not in caplog.text
