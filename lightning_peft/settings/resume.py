"""A resumed run is the run that was begun: its settings are compared, and changes are recorded.

Each checkpoint holds the settings under which it was trained. A resume under others would put into
the run's files what did not run: a new learning rate, which the optimizer's saved state would
silently replace, or a batch size by which half of the record was not made. So a change of anything
that decides numbers is refused, unless ``--resume_with_changes true`` asks for it; then it is
applied, also in the optimizer's groups, and ``run.json`` says from which step on it held.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from lightning_peft.errors import UserError

Change = dict[str, Any]  # of one setting: `key`, `old`, `new`

# Settings that decide no number. How many processes there are, and under which engine, decides
# rounding and masks alone, and has an answer of its own: checkpoint.exact_resume.
FREE = (
    "ckpt_path",
    "resume_with_changes",
    "validate_first",
    "checkpoint",
    "record",
    "model.model_name_or_path",
    "data.num_workers",
    "data.cache_dir",
    *(
        f"trainer.{name}"
        for name in [
            "accelerator",
            "strategy",
            "devices",
            "num_nodes",
            "logger",
            "default_root_dir",
            "enable_progress_bar",
            "enable_checkpointing",
            "enable_model_summary",
            "profiler",
            "num_sanity_val_steps",
            "max_time",
            "fast_dev_run",
            "detect_anomaly",
            "barebones",
            "inference_mode",
            "use_distributed_sampler",
            "log_every_n_steps",
            "limit_test_batches",
            "limit_predict_batches",
        ]
    ),
)
# Of those, what a run's record says too: where it ran, and on which copy of the base, whose values
# the checkpoint's fingerprint answers for.
PLACES = (
    "trainer.accelerator",
    "trainer.strategy",
    "trainer.devices",
    "trainer.num_nodes",
    "model.model_name_or_path",
)
# What a checkpoint's state decides, whatever a command says.
FIXED = ("seed_everything", "data.seed", "model.class_path", "model.optimizer.class_path")
OPTIMIZER = "model.optimizer"


def differences(begun: Any, given: Any, key: str = "") -> Iterator[Change]:
    """Settings that differ, by the keys that users write.

    Args:
        begun: What the run was begun with, as a file holds it.
        given: What the command says.
        key: Where both stand.

    Yields:
        Each change.
    """
    both = isinstance(begun, dict) and isinstance(given, dict)
    if both and begun.get("class_path") == given.get("class_path"):
        for name in {**begun, **given}:
            inner = key if name == "init_args" else f"{key}.{name}".lstrip(".")
            yield from differences(begun.get(name), given.get(name), inner)
    elif both and "class_path" in {**begun, **given}:
        old, new = begun.get("class_path"), given.get("class_path")
        yield {"key": f"{key}.class_path".lstrip("."), "old": old, "new": new}
    elif begun != given:
        yield {"key": key, "old": begun, "new": given}


def is_free(change: Change) -> bool:
    """Whether a change decides no number."""
    key = change["key"]
    return any(key == free or key.startswith(f"{free}.") for free in FREE)


def is_recorded(change: Change) -> bool:
    """Whether ``run.json`` tells a change."""
    return not is_free(change) or change["key"].startswith(PLACES)


def check_changes(changes: list[Change], allowed: bool) -> None:
    """Refuse changes that decide numbers, or that cannot be made.

    Args:
        changes: As found.
        allowed: Whether the command asks for them.

    Raises:
        UserError: Naming key, old and new.
    """
    for change in changes:
        if is_free(change):
            continue
        said = f"{change['key']}: the run was begun with {change['old']}, this command says"
        if change["key"] in FIXED:
            raise UserError(
                f"{said} {change['new']}; the checkpoint's state decides it, so give the old "
                "value, or begin a new run without --ckpt_path."
            )
        if not allowed:
            raise UserError(
                f"{said} {change['new']}; give the old value, or --resume_with_changes true to go "
                "on with the new one from here, which run.json will say."
            )


class ApplyChanges(Callback):
    """Puts changed settings of optimizer and schedule over those that a checkpoint brought back.

    Args:
        changes: What differs from the checkpoint.
    """

    def __init__(self, changes: list[Change]) -> None:
        self._optimizer = any(c["key"].startswith(OPTIMIZER) for c in changes)
        self._fresh: list[list[dict[str, Any]]] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep what the command's settings have made, before the checkpoint replaces it."""
        self._fresh = [
            [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
            for optimizer in trainer.optimizers
        ]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put it back, and let the schedule say the rate of the step that comes."""
        for optimizer, fresh in zip(trainer.optimizers, self._fresh, strict=True):
            for group, new in zip(optimizer.param_groups, fresh, strict=True):
                if self._optimizer:
                    group.update(new)
        for config in trainer.lr_scheduler_configs:
            self._reschedule(config.scheduler)

    def _reschedule(self, scheduler: Any) -> None:
        if not isinstance(scheduler, LRScheduler):
            return
        groups = scheduler.optimizer.param_groups
        scheduler.base_lrs = [group["initial_lr"] for group in groups]
        if isinstance(scheduler, LambdaLR):
            step, lambdas = scheduler.last_epoch, scheduler.lr_lambdas
            for group, base, factor in zip(groups, scheduler.base_lrs, lambdas, strict=True):
                group["lr"] = base * factor(step)
            scheduler._last_lr = [group["lr"] for group in groups]
