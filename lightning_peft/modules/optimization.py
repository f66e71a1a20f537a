"""The optimizer's schedule, and what is refused of an optimizer before a model is loaded."""

from __future__ import annotations

import difflib
import math
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.plugins import MixedPrecision
from torch.optim import Optimizer

from lightning_peft.errors import UserError
from lightning_peft.models.checking import first_sentence


def with_schedule(optimizer: Optimizer, name: str, warmup: float, steps: float) -> dict[str, Any]:
    """What ``configure_optimizers`` returns: an optimizer and a schedule that steps with it.

    Args:
        optimizer: The optimizer.
        name: One that ``transformers.get_scheduler`` knows.
        warmup: Optimizer steps of warm-up; below 1 a share of all steps.
        steps: Optimizer steps of the whole run; may be infinite.

    Raises:
        UserError: If the schedule needs what it is not given, such as an end of the run.
    """
    from transformers import get_scheduler

    total = None if math.isinf(steps) else int(steps)
    first = warmup if warmup >= 1 else warmup * (total or 0)
    try:
        schedule = get_scheduler(name, optimizer, int(first), total)
    except ValueError as error:
        raise UserError(f"model.lr_scheduler_type {name!r}: {error}") from error
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


# Callbacks of Lightning's that change what a run is, behind its settings and its checkpoints; by
# name, since not every supported release has them all.
_AVERAGES = (
    "averages a copy of the whole model, whose ranks would not follow, and no checkpoint or export "
    "would hold the averages"
)
_REFUSED = {
    "WeightAveraging": _AVERAGES,
    "StochasticWeightAveraging": _AVERAGES,
    "LearningRateFinder": (
        "sets a rate that no setting says; try rates by lightning-peft compare (key rates)"
    ),
    "BatchSizeFinder": "sets a size that no setting says; give data.batch_size",
}


def check_callbacks(trainer: Trainer) -> None:
    """Refuse callbacks after which a run is not what its settings and checkpoints say.

    Args:
        trainer: With its callbacks.

    Raises:
        UserError: Naming the callback.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        kinds = [kind.__name__ for kind in type(callback).__mro__]
        if reason := next((_REFUSED[kind] for kind in kinds if kind in _REFUSED), None):
            raise UserError(f"trainer.callbacks: {kinds[0]} {reason}; leave {kinds[0]} out.")


def check_training(optimizer: OptimizerCallable, lr_scheduler_type: str, trainer: Trainer) -> None:
    """Refuse an optimizer's or a schedule's wrong arguments before a model is loaded.

    Args:
        optimizer: Makes the optimizer from parameters.
        lr_scheduler_type: Name of the schedule.
        trainer: Whose precision and clipping the optimizer has to go with.

    Raises:
        UserError: If the optimizer refuses its arguments, there is no such schedule, or a fused
            optimizer would have gradients scaled or not clipped.
    """
    from transformers import SchedulerType

    names = [kind.value for kind in SchedulerType]
    if lr_scheduler_type not in names:
        near = difflib.get_close_matches(lr_scheduler_type, names, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}."
        raise UserError(f"model.lr_scheduler_type: {lr_scheduler_type!r} is no schedule; {hint}")
    try:
        made = optimizer([torch.nn.Parameter(torch.zeros(1))])
    except ValueError as error:
        raise UserError(f"model.optimizer: {first_sentence(error).rstrip('.')}.") from error
    _check_fused(made, trainer)


def _check_fused(optimizer: Optimizer, trainer: Trainer) -> None:
    """Refuse a step that unscales gradients by itself where they are read or clipped before it."""
    precision = trainer.precision_plugin
    if not isinstance(precision, MixedPrecision) or not any(
        group.get("fused") for group in optimizer.param_groups
    ):
        return
    if precision.scaler is not None:
        raise UserError(
            "model.optimizer.fused: with trainer.precision 16-mixed a fused step unscales "
            "gradients by itself, too late for what looks at them before; set it to false."
        )
    if trainer.gradient_clip_val:
        raise UserError(
            "model.optimizer.fused: with trainer.precision bf16-mixed Lightning clips no gradients "
            "for a fused step; set it to false, or trainer.gradient_clip_val to null."
        )
