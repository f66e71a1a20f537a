"""Tests of what a GPU has to do as a CPU does: ``pytest -m gpu``.

Without a GPU the same tests run on the CPU, where most compare a thing with itself: so they are
tried before a GPU is at hand.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_peft.adapters import dropout
from lightning_peft.strategies import droplora

HERE = Path(__file__).parent
OWN = [str(HERE), str(HERE.parent / "engines")]
sys.path[:0] = OWN
# For the processes that tests start, as in tests/engines.
os.environ["PYTHONPATH"] = os.pathsep.join([*OWN, *filter(None, [os.environ.get("PYTHONPATH")])])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/gpu/" in item.path.as_posix():
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The GPU, or the CPU where there is none."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def on_gpu(device: torch.device) -> torch.device:
    """The GPU; a test that has nothing to try on a CPU is skipped."""
    if device.type != "cuda":
        pytest.skip("there is no GPU")
    return device


@pytest.fixture
def same_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks are drawn on the host wherever they are used: streams of devices differ."""
    original = dropout.draw

    def draw(shape: Any, keep: float, device: torch.device, generator: Any = None) -> Tensor:
        host = None
        if generator is not None:
            host = torch.Generator().manual_seed(generator.initial_seed())
        return original(shape, keep, torch.device("cpu"), host).to(device)

    monkeypatch.setattr(dropout, "draw", draw)
    monkeypatch.setattr(droplora, "draw", draw)
