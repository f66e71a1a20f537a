"""Faults of a job as users start it: by the command, which starts another process, or torchrun."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from lightning_peft.runs import find_last, read_checkpoint, step_of

REPOSITORY = Path(__file__).parents[2]
STEPS, EVERY = 30, 2
LOST = "error: another process of this job has ended, so this one ends too"
ENGINES: dict[str, Any] = {
    "ddp": "ddp",
    "zero2": {"class_path": "lightning_peft.engines.DeepSpeed", "init_args": {"stage": 2}},
    "fsdp": {"class_path": "lightning_peft.engines.FSDP"},
}
TORCHRUN = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--max-restarts", "2")


class Job:
    """A fit of two processes, and what they say."""

    def __init__(
        self, folder: Path, name: str, *words: str, launcher: tuple[str, ...] = ()
    ) -> None:
        if name.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
            pytest.skip("deepspeed is not installed")
        self.folder, self.log = folder, folder / "log.txt"
        folder.mkdir(exist_ok=True)
        config = folder / "config.yaml"
        config.write_text(yaml.safe_dump(configuration(folder / "runs", ENGINES[name])))
        command = [*launcher, "-m", "lightning_peft", "fit", "--config", str(config), *words]
        kept = {
            k: v for k, v in os.environ.items() if not k.startswith(("RANK", "LOCAL_", "MASTER_"))
        }
        path = os.pathsep.join([str(REPOSITORY), kept.get("PYTHONPATH", "")])
        one_thread = {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "DS_ACCELERATOR": "cpu"}
        with self.log.open("w") as log:
            self.first = subprocess.Popen(
                [sys.executable, *command], env={**kept, **one_thread}, stdout=log, stderr=log
            )

    def wait_for_steps(self, steps: int, run: str = "version_0") -> None:
        """Until so many steps are in the run's metrics."""
        metrics = self.folder / "runs" / run / "metrics.csv"
        while not metrics.is_file() or metrics.read_text().count("\n") <= steps:
            assert self.first.poll() is None, self.log.read_text()
            time.sleep(0.01)

    def children(self) -> list[int]:
        """The processes that the first one has started, in order."""
        listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True)
        pairs = [line.split() for line in listed.stdout.splitlines()]
        return sorted(int(pid) for pid, parent in pairs if parent == str(self.first.pid))

    def end(self) -> int:
        """The exit status, once it has ended by itself."""
        try:
            return self.first.wait(300)
        except subprocess.TimeoutExpired:
            pytest.fail(f"a process waits for one that has gone\n{self.log.read_text()}")

    def kill(self) -> None:
        for pid in [*self.children(), self.first.pid] if self.first.poll() is None else []:
            os.kill(pid, signal.SIGKILL)
        self.first.wait()


def configuration(root: Path, engine: Any) -> dict[str, Any]:
    """Masks, dropout, removal and short windows; a file of metrics that has a row for each step."""
    adapter = {
        "class_path": "PrunedLoRA",
        "init_args": {
            **{"r": 8, "target_r": 2, "start_step": 3, "prune_every": 6, "prune_count": 2},
            **{
                "recovery": "activation",
                "lora_dropout": 0.1,
                "rank_gate": {"class_path": "StepMask"},
            },
        },
    }
    data = {"task": "subtraction", "regime": "fixed", "train_size": 40, "batch_size": 2}
    return {
        "seed_everything": 1,
        "trainer": {
            **{"accelerator": "cpu", "devices": 2, "strategy": engine, "max_steps": STEPS},
            **{"default_root_dir": str(root), "accumulate_grad_batches": 2, "limit_val_batches": 0},
            **{"log_every_n_steps": 1, "enable_progress_bar": False},
        },
        "model": {
            "class_path": "CausalLMModule",
            "init_args": {"model_name_or_path": "tiny_llama", "adapter": adapter},
        },
        "data": {"class_path": "ArithmeticDataModule", "init_args": data},
        "checkpoint": {"every_n_train_steps": EVERY},
    }


@pytest.fixture
def begin() -> Iterator[Callable[..., Job]]:
    """Starts a job, which no failure of a test leaves behind."""
    jobs: list[Job] = []

    def make(*arguments: Any, **more: Any) -> Job:
        jobs.append(Job(*arguments, **more))
        return jobs[-1]

    yield make
    for job in jobs:
        job.kill()


def lives(pid: int) -> bool:
    stat = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True)
    return bool(stat.stdout.strip()) and not stat.stdout.startswith("Z")


def assert_gone(pid: int, job: Job, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while lives(pid):
        assert time.monotonic() < deadline, f"process {pid} waits\n{job.log.read_text()}"
        time.sleep(0.05)


def assert_same_end(one: Path, other: Path) -> None:
    pairs = [
        [load_file(run / "adapter" / "adapter_model.safetensors") for run in (one, other)],
        [read_checkpoint(find_last(run))["state_dict"] for run in (one, other)],
    ]
    for first, second in pairs:
        assert first.keys() == second.keys()
        for name, value in first.items():
            assert torch.equal(value, second[name]), name


def record(run: Path) -> dict[str, Any]:
    return json.loads((run / "run.json").read_text())


@pytest.mark.slow
def test_a_second_process_whose_first_was_killed_before_they_met_ends_too(
    tmp_path: Path, begin: Callable[..., Job]
) -> None:
    job = begin(tmp_path, "ddp")
    while not (started := job.children()):
        time.sleep(0.01)
    job.first.kill()
    assert_gone(started[0], job, 300)
    assert LOST in job.log.read_text()


# Not in CI, where test_faults.py interrupts jobs in as many ways, without the command line.
@pytest.mark.long
@pytest.mark.parametrize("name", ["ddp", "zero2", "fsdp"])
def test_a_job_that_was_interrupted_in_every_way_ends_as_one_that_was_not(
    name: str, tmp_path: Path, begin: Callable[..., Job]
) -> None:
    whole, broken, restarted = (tmp_path / part for part in ("whole", "broken", "restarted"))
    assert begin(whole, name).end() == 0
    assert_goes_on_after_signals(name, broken, begin)
    assert_same_end(whole / "runs" / "version_0", broken / "runs" / "version_0")
    # An earlier run under the same root, which a job that torchrun restarts must leave alone.
    shutil.copytree(whole / "runs", restarted / "runs")
    assert_goes_on_after_a_restart(name, restarted, begin)
    assert_same_end(whole / "runs" / "version_0", restarted / "runs" / "version_1")


def assert_goes_on_after_signals(name: str, folder: Path, begin: Callable[..., Job]) -> None:
    """A request to save in the first process, a kill of the second, and ``--ckpt_path last``."""
    run = folder / "runs" / "version_0"
    job = begin(folder, name)
    job.wait_for_steps(7)
    (second,) = job.children()
    os.kill(job.first.pid, signal.SIGTERM)
    assert job.end() == 128 + signal.SIGTERM, job.log.read_text()
    assert_gone(second, job)
    saved = step_of(find_last(run))
    assert record(run)["status"] == f"preempted: SIGTERM after {saved} steps"
    assert f"saved after {saved} steps; go on with --ckpt_path last" in job.log.read_text()
    job = begin(folder, name, "--ckpt_path", "last")
    job.wait_for_steps(14)
    (second,) = job.children()
    os.kill(second, signal.SIGKILL)
    # Lightning looks after its processes every five seconds, and at times comes first.
    status, said = job.end(), job.log.read_text()
    assert (status, LOST in said) == (2, True) or (status, "terminated with code -9" in said) == (
        -signal.SIGKILL,
        True,
    ), said
    assert step_of(find_last(run)) >= 14 - EVERY
    assert begin(folder, name, "--ckpt_path", "last").end() == 0
    assert [path.name for path in (folder / "runs").iterdir()] == ["version_0"]
    assert record(run)["status"] == "finished"


def assert_goes_on_after_a_restart(name: str, folder: Path, begin: Callable[..., Job]) -> None:
    """A kill in a job that torchrun restarts, which goes on in the run that it had begun."""
    earlier = folder / "runs" / "version_0"
    before = {path: path.stat().st_mtime for path in earlier.rglob("*")}
    job = begin(folder, name, launcher=TORCHRUN)
    job.wait_for_steps(10, "version_1")
    killed = job.children()
    os.kill(killed[1], signal.SIGKILL)
    job.wait_for_steps(20, "version_1")
    assert not set(job.children()) & set(killed)
    assert job.end() == 0, job.log.read_text()
    assert {path.name for path in (folder / "runs").iterdir()} == {"version_0", "version_1"}
    assert {path: path.stat().st_mtime for path in earlier.rglob("*")} == before


@pytest.mark.slow
def test_sigterm_to_torchrun_has_the_job_save(tmp_path: Path, begin: Callable[..., Job]) -> None:
    job = begin(tmp_path, "ddp", launcher=TORCHRUN)
    job.wait_for_steps(6)
    workers = job.children()
    job.first.send_signal(signal.SIGTERM)
    job.end()
    for pid in workers:
        assert_gone(pid, job)
    run = tmp_path / "runs" / "version_0"
    saved = step_of(find_last(run))
    assert saved >= 6
    assert record(run)["status"] == f"preempted: SIGTERM after {saved} steps"
