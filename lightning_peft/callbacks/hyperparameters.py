"""What a run's loggers are told of it, so that runs can be grouped by strategy, rank or rate."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer

from lightning_peft import engines
from lightning_peft.callbacks.facts import arguments, protocol
from lightning_peft.callbacks.of_trainer import strategy_of


def hyperparameters(trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
    """A run's settings by short names: ``strategy``, the strategy's own, ``lr``, ``batch_size``, ….

    Args:
        trainer: Whose optimizers are set up.
        pl_module: What it trains.
    """
    strategy, data = strategy_of(trainer), getattr(trainer, "datamodule", None)
    found: dict[str, Any] = {
        "strategy": type(strategy).__name__ if strategy else None,
        **(arguments(strategy) if strategy else {}),
        "model": getattr(pl_module, "model_name_or_path", None),
        "dtype": getattr(pl_module, "dtype_name", None),
        "quantization": getattr(pl_module, "quantization", None),
        "lr_scheduler_type": getattr(pl_module, "lr_scheduler_type", None),
        "warmup_steps": getattr(pl_module, "warmup_steps", None),
        "data": type(data).__name__ if data else None,
        "protocol": protocol(trainer),
        "batch_size": getattr(data, "batch_size", None),
        "accumulate_grad_batches": trainer.accumulate_grad_batches,
        "max_steps": trainer.max_steps,
        "max_epochs": trainer.max_epochs,
        "seed": torch.initial_seed(),
        "engine": engines.traits(trainer.strategy).name,
        "processes": trainer.world_size,
    }
    for optimizer in trainer.optimizers[:1]:
        group = optimizer.param_groups[0]
        found["optimizer"] = type(optimizer).__name__
        found["lr"] = group.get("initial_lr", group["lr"])
        found["weight_decay"] = group.get("weight_decay")
    return {key: value for key, value in found.items() if value is not None}
