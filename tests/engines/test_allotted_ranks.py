"""Allotted ranks are the same under every engine, and travel with a run."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import engine_worker
import pytest
import torch

from lightning_peft.strategies import AdapterStrategy
from lightning_peft.strategies.eva import EVA
from lightning_peft.strategies.fisher import FisherLoRA
from lightning_peft.strategies.gora import GoRA

STEPS = 6
MAKE: dict[str, Any] = {
    "FisherLoRA": lambda: FisherLoRA(r=4, max_batches=None),
    "GoRA": lambda: GoRA(r=4),
    "EVA": lambda: EVA(r=2, rho=8),  # some layers lose all of their components
}


def train(name: str, rank: int, folder: Path) -> dict[str, Any]:
    found = {}
    for method, make in MAKE.items():
        adapter: AdapterStrategy = make()
        path = folder / f"{name}-{method}.ckpt"
        found[method] = engine_worker.fit(name, adapter, folder, save_at=3, path=path, steps=STEPS)
    return found


def resume(name: str, rank: int, folder: Path) -> dict[str, Any]:
    found = {}
    for method, make in MAKE.items():
        path = folder / f"single-{method}.ckpt"
        found[method] = engine_worker.fit(name, make(), folder, resume=path, steps=STEPS)
        assert len(found[method]["losses"]) == STEPS - 3
    return found


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one["ranks"] == other["ranks"]
    assert one["decisions"] == other["decisions"]
    assert one["shapes"] == other["shapes"]  # no engine keeps room for what is not used
    assert one["state"].keys() == other["state"].keys()
    for name, value in one["state"].items():
        torch.testing.assert_close(value, other["state"][name], rtol=1e-3, atol=1e-4)


@pytest.mark.long
def test_ranks_are_the_same_under_every_engine_and_travel_with_a_run(tmp_path: Path) -> None:
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    (single,) = engine_worker.launch(train, "single", tmp_path, world=1)
    assert all(len(set(run["ranks"].values())) > 1 for run in single.values())
    assert len(single["EVA"]["ranks"]) < 14
    for name in ("ddp", "zero2"):
        for process in engine_worker.launch(train, name, tmp_path):
            for method, expected in single.items():
                # A sample that is cut in other batches has another mean of squares.
                if method != "FisherLoRA":
                    assert process[method]["ranks"] == expected["ranks"]
                torch.testing.assert_close(
                    torch.tensor(process[method]["losses"]),
                    torch.tensor(expected["losses"]),
                    rtol=1e-2,
                    atol=0,
                )
    for name in ("ddp", "zero2", "zero3", "fsdp"):
        for process in engine_worker.launch(resume, name, tmp_path):
            for method, expected in single.items():
                assert_same(process[method], expected)
