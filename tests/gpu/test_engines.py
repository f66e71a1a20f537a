"""FSDP2 and ZeRO-2 with one process train as one device does, removal and resume included."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import engine_worker
import pytest
import torch

from lightning_peft.strategies import PrunedLoRA

SAVED_AFTER = 5


def pruned() -> PrunedLoRA:
    return PrunedLoRA(
        r=8, target_r=2, start_step=1, prune_every=3, prune_count=2, recovery="gradient"
    )


def train(name: str, rank: int, folder: Path) -> dict[str, Any]:
    """A whole run, and one that goes on from its middle."""
    accelerator = "gpu" if torch.cuda.is_available() else "cpu"
    own = {"steps": 10, "accelerator": accelerator}
    path = folder / f"{name}.ckpt"
    whole = engine_worker.fit(name, pruned(), folder, "SGD", SAVED_AFTER, path=path, **own)
    return {
        "whole": whole,
        "resumed": engine_worker.fit(name, pruned(), folder, "SGD", resume=path, **own),
    }


@pytest.mark.slow
def test_one_process_of_an_engine_is_one_device(
    tmp_path: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", device.type)
    engines = ["fsdp", *(["zero2"] if importlib.util.find_spec("deepspeed") else [])]
    single = engine_worker.launch(train, "single", tmp_path, world=1)[0]
    for name in engines:
        (found,) = engine_worker.launch(train, name, tmp_path, world=1)
        assert found["whole"]["losses"] == pytest.approx(single["whole"]["losses"], rel=1e-5)
        assert found["whole"]["decisions"] == single["whole"]["decisions"]
    for run in (single, found):
        assert run["resumed"]["losses"] == run["whole"]["losses"][SAVED_AFTER:]
        for tensor, value in run["whole"]["state"].items():
            assert torch.equal(run["resumed"]["state"][tensor], value), tensor
