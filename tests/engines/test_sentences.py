"""Checkpoints that a run cannot go on from are refused in one sentence."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lightning_peft.callbacks import Checkpoints
from lightning_peft.runs import read_checkpoint


def test_a_checkpoint_of_another_number_of_processes_where_exactness_is_asked_for() -> None:
    trainer: Any = SimpleNamespace(world_size=1)
    saved = {"random_state": [{}, {}]}
    Checkpoints().on_load_checkpoint(trainer, None, saved)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="checkpoint is of 2 processes, this run has 1; give as"):
        Checkpoints(exact_resume=True).on_load_checkpoint(trainer, None, saved)  # type: ignore[arg-type]


def test_a_folder_of_shards_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a folder of shards that another program wrote"):
        read_checkpoint(tmp_path)
