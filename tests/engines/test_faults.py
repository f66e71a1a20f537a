"""A job that loses a process, or is told to end, goes on from its checkpoint as if it had not."""

from __future__ import annotations

import importlib.util
import os
import pickle
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import engine_worker
import pytest
import torch
from lightning.pytorch import Callback, Trainer

from lightning_peft.callbacks import Checkpoints
from lightning_peft.runs import find_last, read_checkpoint, step_of
from lightning_peft.strategies import DropLoRA, PrunedLoRA

EVERY = 2  # steps to a checkpoint
KILLS = 20
ENGINES = ("ddp", "zero2", "zero3", "fsdp")
# ZeRO-3's processes end and save as ZeRO-2's do.
SLOW_ENGINES = (
    "ddp",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("zero2", "fsdp")),
    pytest.param("zero3", marks=pytest.mark.long),
)
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
LOST = "Connection closed by peer|Connection reset by peer"


def pruned() -> PrunedLoRA:
    """Its activation sums and its masks are each process' own."""
    gate = DropLoRA(r=8, p=0.3).rank_gate
    schedule = {"r": 8, "target_r": 2, "start_step": 2, "prune_every": 5, "prune_count": 2}
    return PrunedLoRA(**schedule, recovery="activation", rank_gate=gate)  # type: ignore[arg-type]


class Progress(Callback):
    """A file with a byte for each step that was made, for the test to wait for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.write_bytes(b"")

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        with self.path.open("ab") as file:
            file.write(b"." * (trainer.global_step - self.path.stat().st_size))


def session(name: str, rank: int, folder: Path, **more: Any) -> dict[str, Any]:
    """Train from the last checkpoint, if there is one, to the end."""
    saves = more.pop("saves", None) or Checkpoints(every_n_train_steps=EVERY)
    saves.dirpath = str(folder / "checkpoints")
    try:
        last: Path | None = find_last(folder)
    except FileNotFoundError:
        last = None
    steps = Progress(folder / f"steps-{rank}")
    done = engine_worker.fit(name, pruned(), folder, resume=last, callbacks=[steps, saves])
    return {**done, "resumed": None if last is None else last.name}


class SignalledWhileSaving(Checkpoints):
    """Gets a signal just after the processes have agreed that there was none, in one of them."""

    def _save(self, trainer: Trainer) -> None:
        if trainer.global_step == EVERY and trainer.global_rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        super()._save(trainer)


def signalled_while_saving(name: str, rank: int, folder: Path) -> dict[str, Any]:
    return session(name, rank, folder, saves=SignalledWhileSaving(every_n_train_steps=EVERY))


def start(name: str, folder: Path, task: engine_worker.Task = session) -> Any:
    if name.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    folder.mkdir(exist_ok=True)
    for path in folder.glob("steps-*"):
        path.unlink()
    return engine_worker.start(task, name, folder)


def finish(job: Any, seconds: float = 300) -> list[int | None]:
    """Exit statuses, once all have ended by themselves."""
    for process in job.processes:
        process.join(seconds)
        assert process.exitcode is not None, "a process waits for one that has gone"
    return [process.exitcode for process in job.processes]


def error(job: Any, rank: int) -> str:
    """The traceback of a process that has ended with one."""
    path = Path(job.error_files[rank])
    return pickle.loads(path.read_bytes()) if path.exists() else ""


def wait_for(job: Any, ready: Callable[[], bool]) -> bool:
    """Wait until something is so; False if a process has ended before."""
    while not ready():
        if any(process.exitcode is not None for process in job.processes):
            return False
        time.sleep(0.002)
    return True


def steps_made(folder: Path, rank: int = 0) -> int:
    path = folder / f"steps-{rank}"
    return path.stat().st_size if path.exists() else 0


def assert_same_end(name: str, one: Path, other: Path) -> None:
    for rank in range(2):
        first, second = (
            torch.load(folder / f"{name}-{rank}.pt", weights_only=False) for folder in (one, other)
        )
        assert first["decisions"] == second["decisions"]
        for tensor, value in first["state"].items():
            assert torch.equal(value, second["state"][tensor]), tensor


def resumed_from(name: str, folder: Path) -> list[str]:
    paths = [folder / f"{name}-{rank}.pt" for rank in range(2)]
    return [torch.load(path, weights_only=False)["resumed"] for path in paths]


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a job that nothing happened to, by engine."""
    done: dict[str, Path] = {}

    def find(name: str) -> Path:
        if name not in done:
            folder = tmp_path_factory.mktemp("whole") / name
            job = start(name, folder)
            assert finish(job) == [0, 0], error(job, 0)
            done[name] = folder
        return done[name]

    return find


@pytest.mark.parametrize("name", SLOW_ENGINES)
def test_a_job_that_is_stopped_in_every_way_ends_as_one_that_is_not(
    name: str, tmp_path: Path, whole: Callable[[str], Path]
) -> None:
    # One session after another: each signal in one of the processes, then a kill of either.
    for number, rank, after in ((signal.SIGTERM, 1, 3), (signal.SIGUSR1, 0, 7)):
        job = start(name, tmp_path)
        assert wait_for(job, lambda after=after: steps_made(tmp_path) >= after), error(job, 0)
        os.kill(job.processes[rank].pid, number)
        assert finish(job) == [128 + number, 0], error(job, 0)
        saved = find_last(tmp_path)
        assert after <= step_of(saved) < engine_worker.STEPS
        assert read_checkpoint(saved)["global_step"] == step_of(saved)
        for process in range(2):  # neither began another step
            assert steps_made(tmp_path, process) <= step_of(saved)
    for rank, after in ((0, 11), (1, 15)):
        job = start(name, tmp_path)
        assert wait_for(job, lambda after=after: steps_made(tmp_path) >= after), error(job, 0)
        os.kill(job.processes[rank].pid, signal.SIGKILL)
        statuses = finish(job)
        assert statuses[rank] == -signal.SIGKILL
        assert statuses[1 - rank] == 1
        reason = error(job, 1 - rank)
        assert any(sign in reason for sign in LOST.split("|")), reason
        saved = find_last(tmp_path)
        assert step_of(saved) >= after - EVERY
    # A crash in the middle of writing: the newest file is cut off, and the one before it serves.
    folder = tmp_path / "checkpoints"
    (folder / "step=99.ckpt").write_bytes(saved.read_bytes()[:1000])
    (folder / ".step=100.ckpt.1.part").write_bytes(b"PK")
    with pytest.warns(UserWarning, match="cut off or damaged"):
        assert find_last(tmp_path) == saved
    assert finish(start(name, tmp_path)) == [0, 0]
    assert resumed_from(name, tmp_path) == [saved.name, saved.name]
    left = {path.name for path in folder.iterdir()}
    assert {"step=18.ckpt", "step=20.ckpt"} <= left
    assert not left & {"step=99.ckpt", ".step=100.ckpt.1.part"}
    assert_same_end(name, whole(name), tmp_path)


@pytest.mark.parametrize("name", SLOW_ENGINES)
def test_a_signal_that_comes_while_the_processes_save_is_acted_on_by_all_after_the_next_step(
    name: str, tmp_path: Path
) -> None:
    job = start(name, tmp_path, signalled_while_saving)
    assert finish(job) == [128 + signal.SIGTERM, 0], error(job, 0)
    assert step_of(find_last(tmp_path)) == EVERY + 1


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", ["ddp", "zero2"])
def test_twenty_kills_change_nothing(
    name: str, tmp_path: Path, whole: Callable[[str], Path]
) -> None:
    draw, fell_in_training = random.Random(0), 0

    def go_to_the_end() -> None:
        job = start(name, tmp_path)
        assert finish(job) == [0, 0], error(job, 0)
        assert_same_end(name, whole(name), tmp_path)
        for path in tmp_path.glob("checkpoints/*"):
            path.unlink()

    for _ in range(KILLS):
        files = list(tmp_path.glob("checkpoints/step=*.ckpt"))
        done = max((step_of(path) for path in files), default=0)
        if done > engine_worker.STEPS - 4:
            go_to_the_end()
            done = 0
        how, rank = draw.choice(["one", "all", "SIGTERM"]), draw.randrange(2)
        after = done + draw.randrange(1, 5)
        job = start(name, tmp_path)
        wait_for(job, lambda after=after: steps_made(tmp_path) >= after)
        time.sleep(draw.uniform(0, 0.05))  # into the steps and the checkpoints
        number = signal.SIGTERM if how == "SIGTERM" else signal.SIGKILL
        for process in job.processes if how == "all" else [job.processes[rank]]:
            if process.is_alive():
                os.kill(process.pid, number)
        fell_in_training += finish(job) != [0, 0]
    go_to_the_end()
    print(f"{name}: {fell_in_training} of {KILLS} kills fell within training")
    assert fell_in_training >= KILLS * 0.9
