"""What callbacks ask of a trainer."""

from __future__ import annotations

from lightning.pytorch import Callback, Trainer

from lightning_peft.strategies.base import AdapterStrategy


def strategy_of(trainer: Trainer) -> AdapterStrategy | None:
    """The run's strategy, which is one of the trainer's callbacks."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return next((c for c in callbacks if isinstance(c, AdapterStrategy)), None)
