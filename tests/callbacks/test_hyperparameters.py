"""A run's loggers are told what it is, by names to group by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger

from lightning_peft.callbacks import RunRecord
from lightning_peft.datamodules import ArithmeticDataModule
from lightning_peft.modules import CausalLMModule
from lightning_peft.strategies import DropLoRA


class Told(CSVLogger):
    """Remembers what it was told."""

    told: dict[str, Any]

    def log_hyperparams(self, params: Any = None, *args: Any, **kwargs: Any) -> None:
        if params:
            self.told = dict(params)


def test_a_logger_can_group_runs_by_strategy_rank_and_rate(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logger = Told(tmp_path)
    trainer = Trainer(
        accelerator="cpu",
        logger=logger,
        max_steps=1,
        limit_val_batches=0,
        accumulate_grad_batches=2,
        default_root_dir=tmp_path,
        callbacks=[RunRecord(export_adapter=False)],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = ArithmeticDataModule(batch_size=2, train_size=8, val_size=2, test_size=2)
    trainer.fit(CausalLMModule(str(base), adapter=DropLoRA(r=3, p=0.25)), data)
    told = logger.told
    expected = {
        "strategy": "DropLoRA",
        "r": 3,
        "p": 0.25,
        "lr": 1e-3,
        "optimizer": "AdamW",
        "batch_size": 2,
        "accumulate_grad_batches": 2,
        "data": "ArithmeticDataModule",
        "model": str(base),
        "engine": "one device",
        "processes": 1,
        "max_steps": 1,
    }
    assert {key: told[key] for key in expected} == expected
