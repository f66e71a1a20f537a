"""What callbacks ask of a trainer."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger

from lightning_peft.callbacks.of_trainer import run_folder, strategy_of
from lightning_peft.strategies import LoRA


def test_a_run_lies_in_its_loggers_folder_or_the_root(tmp_path: Path) -> None:
    plain = Trainer(accelerator="cpu", logger=False, default_root_dir=tmp_path / "root")
    assert run_folder(plain) == tmp_path / "root"
    logged = Trainer(accelerator="cpu", logger=CSVLogger(tmp_path, "run", version=3))
    assert run_folder(logged) == tmp_path / "run" / "version_3"


def test_the_strategy_is_found_among_the_callbacks(tmp_path: Path) -> None:
    strategy = LoRA(r=2)
    options = {"accelerator": "cpu", "logger": False, "default_root_dir": tmp_path}
    assert strategy_of(Trainer(callbacks=[Callback(), strategy], **options)) is strategy
    assert strategy_of(Trainer(**options)) is None
