"""What callbacks ask of a trainer."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Callback, Trainer

from lightning_peft.strategies.base import AdapterStrategy


def run_folder(trainer: Trainer) -> Path:
    """Where a run leaves its files: the first logger's folder, or the trainer's root.

    It is a broadcast: all processes call it.
    """
    return Path(trainer.log_dir or trainer.default_root_dir)


def strategy_of(trainer: Trainer) -> AdapterStrategy | None:
    """The run's strategy, which is one of the trainer's callbacks."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return next((c for c in callbacks if isinstance(c, AdapterStrategy)), None)
