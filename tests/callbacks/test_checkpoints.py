"""When checkpoints are written, and when a run ends early."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_peft.callbacks.checkpoints import Checkpoints, Preempted


class Module(pl.LightningModule):
    """Sends itself a signal in the batch that ``told_at`` names."""

    def __init__(self, told_at: int = -1) -> None:
        super().__init__()
        self.layer, self.told_at = torch.nn.Linear(2, 1), told_at

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        if batch_idx == self.told_at:
            os.kill(os.getpid(), signal.SIGUSR1)
        return self.layer(batch).square().mean()

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None: ...

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(
    folder: Path,
    checkpoints: Checkpoints,
    module: Module | None = None,
    ckpt_path: Path | None = None,
    **options: Any,
) -> None:
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        callbacks=[checkpoints],
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"max_steps": 7, "limit_val_batches": 0, **options},
    )
    loader = DataLoader(torch.ones(20, 2), batch_size=2)
    trainer.fit(module or Module(), loader, loader, ckpt_path=ckpt_path)


def saved(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").glob("*"))


def test_the_last_two_are_kept_and_the_end_is_one(tmp_path: Path) -> None:
    fit(tmp_path, Checkpoints(every_n_train_steps=3))
    assert saved(tmp_path) == ["step=6.ckpt", "step=7.ckpt"]


def test_all_are_kept_on_demand(tmp_path: Path) -> None:
    fit(tmp_path, Checkpoints(every_n_train_steps=3, save_top_k=-1))
    assert saved(tmp_path) == ["step=3.ckpt", "step=6.ckpt", "step=7.ckpt"]


def test_steps_are_optimizer_steps(tmp_path: Path) -> None:
    checkpoints = Checkpoints(every_n_train_steps=2, save_top_k=-1)
    fit(tmp_path, checkpoints, max_steps=5, accumulate_grad_batches=2)
    assert saved(tmp_path) == ["step=2.ckpt", "step=4.ckpt", "step=5.ckpt"]


def test_where_a_validation_follows_the_checkpoint_comes_after_it(tmp_path: Path) -> None:
    order: list[str] = []

    class Ordered(Checkpoints):
        def _save(self, trainer: pl.Trainer) -> None:
            order.append(f"save {trainer.global_step}")
            super()._save(trainer)

    class Validated(Module):
        def on_validation_epoch_end(self) -> None:
            order.append("validated")

    options = {"limit_val_batches": 1, "num_sanity_val_steps": 0, "val_check_interval": 2}
    fit(tmp_path, Ordered(every_n_train_steps=2), Validated(), max_steps=3, **options)
    assert order == ["validated", "save 2", "save 3"]


def test_a_signal_saves_after_the_step_and_ends_the_process(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGUSR1)
    with pytest.raises(Preempted) as caught:
        fit(tmp_path, Checkpoints(), Module(told_at=3))
    assert caught.value.code == 128 + signal.SIGUSR1
    assert str(caught.value) == "SIGUSR1 after 4 steps"
    assert saved(tmp_path) == ["step=4.ckpt"]
    assert signal.getsignal(signal.SIGUSR1) == before


def test_other_processes_end_with_zero() -> None:
    assert Preempted(signal.SIGTERM, 5, first=False).code == 0


def test_what_lies_after_the_checkpoint_and_torn_files_are_removed(tmp_path: Path) -> None:
    fit(tmp_path, Checkpoints(every_n_train_steps=2, save_top_k=-1))
    folder = tmp_path / "checkpoints"
    (folder / ".step=8.ckpt.part").write_text("torn")
    again = Checkpoints()
    again.dirpath = str(folder)
    fit(tmp_path, again, ckpt_path=folder / "step=2.ckpt", max_steps=3)
    assert saved(tmp_path) == ["step=2.ckpt", "step=3.ckpt"]


def test_another_number_of_processes_is_refused_where_resuming_must_be_exact(
    tmp_path: Path,
) -> None:
    trainer = pl.Trainer(accelerator="cpu", logger=False, default_root_dir=tmp_path)
    of_two = {"random_state": [0, 1]}
    Checkpoints().on_load_checkpoint(trainer, Module(), of_two)
    with pytest.raises(ValueError, match="the checkpoint is of 2 processes, this run has 1"):
        Checkpoints(exact_resume=True).on_load_checkpoint(trainer, Module(), of_two)
    Checkpoints(exact_resume=True).on_load_checkpoint(trainer, Module(), {"random_state": [0]})
