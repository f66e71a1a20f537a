"""A run that is killed at any moment and resumed ends as one that was never stopped."""

from __future__ import annotations

import csv
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from lightning_peft.cli import main
from lightning_peft.runs import read_checkpoint

STRATEGIES = {
    "DropLoRA": {"r": 8, "p": 0.3, "mask": "step"},
    "PrunedLoRA": {
        "r": 8,
        "target_r": 2,
        "start_step": 3,
        "prune_every": 4,
        "prune_count": 1,
        "recovery": "gradient",
        "allocation": "global",
    },
    "LoRADrop": {"r": 4, "threshold": 0.6, "max_probe_steps": 5, "probe_epochs": 1},
}
BASELINES = {
    "DoRA": {"r": 4},
    "PiSSA": {"r": 4, "rank_gate": {"class_path": "StepMask", "init_args": {"p": 0.3}}},
    "VeRA": {"r": 16},
    "TiedLoRA": {"r": 4},
    "SparseAdapter": {"r": 4, "start_step": 5},
    "AdaLoRA": {"r": 6, "target_r": 3, "tinit": 3, "tfinal": 8, "deltaT": 2},
    "GaLore": {"r": 4, "update_proj_gap": 7},
    "FullFineTuning": {},
}
WITHOUT_ADAPTERS = ("GaLore", "FullFineTuning")
STEPS = 30
TIMED = {"tokens_per_second"}


def write_config(path: Path, base: Path, name: str) -> Path:
    """Dropout, masks, accumulation, and epochs that end within windows and between checkpoints."""
    dropout = {} if name in WITHOUT_ADAPTERS else {"lora_dropout": 0.1}
    arguments = {**STRATEGIES, **BASELINES}[name]
    adapter = {"class_path": name, "init_args": {**arguments, **dropout}}
    config = {
        "seed_everything": 1,
        "trainer": {
            "accelerator": "cpu",
            "default_root_dir": str(path / "runs"),
            "max_steps": STEPS,
            "accumulate_grad_batches": 2,
            "val_check_interval": 6,
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
        },
        "model": {
            "class_path": "CausalLMModule",
            "init_args": {
                "model_name_or_path": str(base),
                "adapter": adapter,
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-2}},
                "warmup_steps": 3,
            },
        },
        "data": {
            "class_path": "ArithmeticDataModule",
            "init_args": {
                "task": "subtraction",
                "regime": "fixed",
                "train_size": 100,
                "val_size": 16,
                "test_size": 16,
                "batch_size": 8,
            },
        },
        "importance": {"every_n_steps": 2},
        "checkpoint": {"every_n_train_steps": 4},
    }
    path.mkdir(exist_ok=True)
    file = path / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


def run(config: Path, resume: bool, kill: tuple[int, float] | None = None) -> bool:
    """Fit in a forked process; whether it came to its end.

    With ``kill`` it gets SIGKILL so many seconds after its metrics hold so many steps.
    """
    child = os.fork()
    if child == 0:
        silence = os.open(config.parent / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(silence, 1)
        os.dup2(silence, 2)
        code = 1
        try:
            main(["fit", "--config", str(config), *(["--ckpt_path", "last"] if resume else [])])
            code = 0
        finally:
            os._exit(code)
    metrics = config.parent / "runs" / "version_0" / "metrics.csv"
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            assert os.waitstatus_to_exitcode(status) == 0, (config.parent / "log.txt").read_text()
            return True
        if kill is not None and metrics.is_file() and metrics.read_text().count("\n") > kill[0]:
            time.sleep(kill[1])
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            return os.WIFEXITED(status)
        time.sleep(0.001)


def result(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The exported adapter or model, and the tensors of the last checkpoint."""
    last = max(folder.glob("checkpoints/*.ckpt"), key=lambda p: int(p.stem.split("=")[1]))
    (written,) = folder.glob("*/*model.safetensors")
    return load_file(written), read_checkpoint(last)["state_dict"]


def rows(path: Path) -> list[dict[str, str]]:
    """A csv file's rows without what a clock measured."""
    with path.open() as file:
        return [{k: v for k, v in row.items() if k not in TIMED} for row in csv.DictReader(file)]


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    assert all(torch.equal(left[key], right[key]) for key in left)


def kill_and_compare(tmp_path: Path, base: Path, name: str, kills: int, seed: int) -> None:
    whole = write_config(tmp_path / "whole", base, name)
    assert run(whole, resume=False)
    expected = result(whole.parent / "runs" / "version_0")
    moments = random.Random(seed)
    for kill in range(kills):
        config = write_config(tmp_path / f"killed-{kill}", base, name)
        # From the first step to what comes after the last; the delay reaches into the steps, the
        # validation and the checkpoints between two rows.
        if run(config, resume=False, kill=(moments.randrange(STEPS), moments.uniform(0, 0.1))):
            continue  # the kill came after the end, and there is nothing left to go on with
        assert run(config, resume=any(config.parent.glob("runs/*/checkpoints/*.ckpt")))
        folder = sorted((config.parent / "runs").glob("version_*"))[-1]
        for left, right in zip(expected, result(folder), strict=True):
            assert_same(left, right)
        for table in ("metrics.csv", "importance.csv"):
            assert rows(folder / table) == rows(whole.parent / "runs/version_0" / table), table


@pytest.mark.parametrize(
    "name",
    [n if n == "DropLoRA" else pytest.param(n, marks=pytest.mark.slow) for n in STRATEGIES],
)
def test_a_killed_run_resumes_to_the_same_bits(tmp_path: Path, base: Path, name: str) -> None:
    kill_and_compare(tmp_path, base, name, kills=2, seed=0)


def test_a_run_killed_after_its_last_step_still_leaves_what_it_should(
    tmp_path: Path, base: Path
) -> None:
    config = write_config(tmp_path / "run", base, "DropLoRA")
    assert run(config, resume=False)
    folder = config.parent / "runs" / "version_0"
    left = ("importance.png", "decisions.csv", "adapter/adapter_model.safetensors")
    expected = (folder / left[-1]).read_bytes()
    # As at a kill between the last checkpoint and what comes after it.
    for name in left:
        (folder / name).unlink()
    record = folder / "run.json"
    record.write_text(record.read_text().replace('"finished"', '"running"'))
    assert run(config, resume=True)
    assert all((folder / name).is_file() for name in left)
    assert (folder / left[-1]).read_bytes() == expected
    assert '"finished"' in record.read_text()


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", STRATEGIES)
def test_twenty_killed_runs_resume_to_the_same_bits(tmp_path: Path, base: Path, name: str) -> None:
    kill_and_compare(tmp_path, base, name, kills=20, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    # In CI one that changes its shape as it trains.
    [n if n == "AdaLoRA" else pytest.param(n, marks=pytest.mark.long) for n in BASELINES],
)
def test_killed_runs_of_the_baselines_resume_to_the_same_bits(
    tmp_path: Path, base: Path, name: str
) -> None:
    kill_and_compare(tmp_path, base, name, kills=2, seed=2)
