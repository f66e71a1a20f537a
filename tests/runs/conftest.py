"""A checkpoint such as a module of ours writes, but for its size."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_peft.runs import AtomicCheckpointIO, RunFolder


def content(step: int = 1, **other: Any) -> dict[str, Any]:
    weights = {"model.q.lora_A": torch.arange(6.0).view(2, 3), "model.q.lora_B": torch.ones(3, 2)}
    adapter = {
        "strategy": "LoRA",
        "arguments": {"r": 2},
        "layers": ["q"],
        "state": {},
    }
    moments = {"state": {0: {"exp_avg": torch.zeros(2, 3), "step": torch.tensor(1.0)}}}
    return {
        "global_step": step,
        "state_dict": weights,
        "adapter": adapter,
        "optimizer_states": [moments],
        **other,
    }


@pytest.fixture
def make_content() -> Callable[..., dict[str, Any]]:
    return content


@pytest.fixture
def save() -> Callable[[Path, int], Path]:
    """Writes one: ``save(path, step)``."""

    def write(path: Path, step: int, **other: Any) -> Path:
        AtomicCheckpointIO().save_checkpoint(content(step, **other), path)
        return path

    return write


@contextmanager
def another_process_at(folder: Path, shared: bool = False) -> Iterator[int]:
    """Within, another process holds a run's folder; it is killed at the end."""
    out, into = os.pipe()
    child = os.fork()
    if child == 0:
        held = RunFolder(folder, shared=shared)
        os.write(into, b"held" if held else b"")
        signal.pause()
    assert os.read(out, 4) == b"held"
    try:
        yield child
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(out)
        os.close(into)


@pytest.fixture
def at_work() -> Callable[..., Any]:
    return another_process_at
