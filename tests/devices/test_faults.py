"""A job that loses a process, or is told to end, goes on from its checkpoint as if it had not."""

from __future__ import annotations

import importlib.util
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import engine_worker
import pytest
import torch
import torch.multiprocessing as mp

from lightning_peft.callbacks import Checkpoints
from lightning_peft.runs import find_last, read_checkpoint
from lightning_peft.strategies import DropLoRA, PrunedLoRA

KILLS = 20
SECONDS = 1.5  # that training takes, about: kills fall within


def pruned() -> PrunedLoRA:
    """Its activation sums and its masks are each process' own."""
    gate = DropLoRA(r=8, p=0.3).rank_gate
    schedule = {"r": 8, "target_r": 2, "start_step": 2, "prune_every": 5, "prune_count": 2}
    return PrunedLoRA(**schedule, recovery="activation", rank_gate=gate)  # type: ignore[arg-type]


def session(name: str, rank: int, folder: Path) -> dict[str, Any]:
    """Train from the last checkpoint, if there is one, to the end."""
    saves = Checkpoints(every_n_train_steps=2)
    saves.dirpath = str(folder / "checkpoints")
    try:
        last: Path | None = find_last(folder)
    except FileNotFoundError:
        last = None
    began = folder / f"began-{rank}"
    began.touch()
    return engine_worker.fit(name, pruned(), folder, resume=last, callbacks=[saves])


def start(name: str, folder: Path) -> Any:
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["engine_worker"])
    (folder / "began-0").unlink(missing_ok=True)
    arguments = (2, engine_worker.free_port(), session, name, str(folder))
    return mp.start_processes(
        engine_worker.process, arguments, nprocs=2, join=False, start_method="forkserver"
    ).processes


def finish(processes: Any, seconds: float = 120) -> list[int | None]:
    """Exit statuses, once all have ended by themselves."""
    for process in processes:
        process.join(seconds)
        assert process.exitcode is not None, "a process waits for one that has gone"
    return [process.exitcode for process in processes]


def interrupt(processes: Any, folder: Path, how: str, after: float) -> list[int | None]:
    deadline = time.time() + 120
    while not (folder / "began-0").exists() and time.time() < deadline:
        time.sleep(0.02)
    time.sleep(after)
    number = signal.SIGTERM if how == "SIGTERM" else signal.SIGKILL
    for process in processes if how == "all" else processes[-1:]:
        if process.is_alive():
            os.kill(process.pid, number)
    return finish(processes)


def results(name: str, folder: Path) -> list[dict[str, Any]]:
    return [torch.load(folder / f"{name}-{rank}.pt", weights_only=False) for rank in range(2)]


def assert_same_end(name: str, one: Path, other: Path) -> None:
    for first, second in zip(results(name, one), results(name, other), strict=True):
        assert first["decisions"] == second["decisions"]
        for tensor, value in first["state"].items():
            assert torch.equal(value, second["state"][tensor]), tensor


@pytest.mark.long  # and not reliable yet: at times the first process ends with status 1
def test_sigterm_to_one_process_saves_and_ends_all(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir(), broken.mkdir()
    assert finish(start("ddp", whole)) == [0, 0]
    processes = start("ddp", broken)
    while not list(broken.glob("checkpoints/step=*.ckpt")):
        time.sleep(0.005)
    os.kill(processes[1].pid, signal.SIGTERM)
    assert finish(processes) == [128 + signal.SIGTERM, 0]
    saved = find_last(broken)
    assert read_checkpoint(saved)["global_step"] < engine_worker.STEPS
    # A crash in the middle of writing: the newest file is cut off, and the one before it serves.
    newest = broken / "checkpoints" / "step=99.ckpt"
    newest.write_bytes(saved.read_bytes()[:1000])
    with pytest.warns(UserWarning, match="cut off or damaged"):
        assert find_last(broken) == saved
    assert finish(start("ddp", broken)) == [0, 0]
    assert_same_end("ddp", whole, broken)


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", ["ddp", "zero2"])
def test_twenty_kills_change_nothing(name: str, tmp_path: Path) -> None:
    if name != "ddp" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir(), broken.mkdir()
    assert finish(start(name, whole)) == [0, 0]
    draw, kills = random.Random(0), 0
    while kills < KILLS:
        how = draw.choice(["one", "all", "SIGTERM"])
        statuses = interrupt(start(name, broken), broken, how, draw.uniform(0, SECONDS))
        kills += 1
        if statuses == [0, 0]:  # it came to its end first: all over again
            assert_same_end(name, whole, broken)
            for path in broken.glob("checkpoints/*"):
                path.unlink()
    assert finish(start(name, broken)) == [0, 0]
    assert_same_end(name, whole, broken)
