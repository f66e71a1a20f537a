"""What callbacks ask of a trainer."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Callback, Trainer

from lightning_peft.callbacks.of_trainer import strategy_of
from lightning_peft.strategies import LoRA


def test_the_strategy_is_found_among_the_callbacks(tmp_path: Path) -> None:
    strategy = LoRA(r=2)
    options = {"accelerator": "cpu", "logger": False, "default_root_dir": tmp_path}
    assert strategy_of(Trainer(callbacks=[Callback(), strategy], **options)) is strategy
    assert strategy_of(Trainer(**options)) is None
