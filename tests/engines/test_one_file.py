"""Checkpoints in one file; see test_travel.py for what goes from engine to engine."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from lightning_peft import engines
from lightning_peft.runs import AtomicCheckpointIO


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> engines.FSDP:
    """One that writes and meets nobody."""
    made = engines.FSDP()
    made.checkpoint_io = AtomicCheckpointIO()
    monkeypatch.setattr(made, "barrier", lambda *args: None)
    return made


def test_the_module_fills_in_what_it_gathers(engine: engines.FSDP) -> None:
    assert engine.lightning_module_state_dict() == {}
    assert engine.optimizer_state(torch.optim.SGD(nn.Linear(1, 1).parameters())) == {}
    assert engine.restore_checkpoint_after_setup
    assert engine.lightning_restore_optimizer


@pytest.mark.parametrize("first", [True, False])
def test_the_first_process_writes_one_file_which_all_read(
    first: bool, engine: engines.FSDP, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(engine), "is_global_zero", first)
    path = tmp_path / "step=1.ckpt"
    engine.save_checkpoint({"global_step": 1, "state_dict": {"a": torch.ones(2)}}, path)
    assert path.is_file() == first
    if first:
        found = engine.load_checkpoint(path)
        assert found["global_step"] == 1
        assert torch.equal(found["state_dict"]["a"], torch.ones(2))


def test_what_was_saved_goes_to_the_module_and_the_optimizers(engine: engines.FSDP) -> None:
    loaded: dict[str, Any] = {}
    module: Any = SimpleNamespace(load_state_dict=lambda state, strict: loaded.update(state))
    engine._lightning_module = module
    optimizers = []
    for momentum in (0.9, 0.5):
        optimizers.append(torch.optim.SGD(nn.Linear(1, 1).parameters(), 0.1, momentum))
    engine.optimizers = [optimizers[0]]
    engine.load_model_state_dict({"state_dict": {"a": 1}})
    engine.load_optimizer_state_dict({"optimizer_states": [optimizers[1].state_dict()]})
    assert loaded == {"a": 1}
    assert optimizers[0].param_groups[0]["momentum"] == 0.5
