"""What a run was, how it ended, and what it leaves to take away: ``run.json`` and its weights."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from lightning_peft import distributed, engines
from lightning_peft.adapters import adapter_layers, trainable_parameters
from lightning_peft.atomic import alone_at, write_text
from lightning_peft.callbacks.checkpoints import Preempted
from lightning_peft.callbacks.facts import (
    arguments,
    commit,
    numbers,
    peak_memory_mb,
    protocol,
    versions,
)
from lightning_peft.callbacks.hyperparameters import hyperparameters
from lightning_peft.callbacks.of_trainer import strategy_of
from lightning_peft.callbacks.take_away import take_away
from lightning_peft.errors import UserError
from lightning_peft.runs import run_folder


class RunRecord(Callback):
    """Writes the run's record at its start and its end, and the adapter in PEFT's format.

    The record holds strategy and arguments, protocol, seed, versions, commit, parameter counts,
    ranks, seconds (over all sessions of a resumed run; of a step without
    validation), peak memory and the last metrics. A test
    adds its scores to the record of the run that it tests.

    Args:
        export_adapter: Whether to write ``adapter/`` (or ``model/``) when training ends.
    """

    def __init__(self, export_adapter: bool = True) -> None:
        super().__init__()
        self.export_adapter = export_adapter
        self.seconds_before = self.step_seconds = 0.0
        self._began = time.perf_counter()
        self._start_parameters: int | None = None
        self._started = False
        self._exported: str | None = None
        self._folder: Path | None = None
        # What a resume has changed of the settings: before this session, and by it.
        self.changes: list[dict[str, Any]] = []
        self.new_changes: list[dict[str, Any]] = []

    def state_dict(self) -> dict[str, Any]:
        """Seconds until now, and the parameter count at the start."""
        return {
            "seconds": self.seconds,
            "step_seconds": self.step_seconds,
            "start_parameters": self._start_parameters,
            "changes": self.changes,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self.seconds_before = state_dict["seconds"]
        self.step_seconds = state_dict["step_seconds"]
        self._start_parameters = state_dict["start_parameters"]
        self.changes = list(state_dict.get("changes", []))

    @property
    def seconds(self) -> float:
        """Training time, over all sessions of the run."""
        return self.seconds_before + time.perf_counter() - self._began

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count from here."""
        if self._start_parameters is None:
            self._start_parameters = trainable_parameters(pl_module, include_saved=True)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write what is known now, so that a killed run has its record."""
        self._began, self._started = time.perf_counter(), True
        self.changes += [{"from_step": trainer.global_step, **c} for c in self.new_changes]
        self.new_changes = []
        # On every process, since finding it is a broadcast; later on one process may be alone.
        self._folder = run_folder(trainer)
        self._write(trainer, pl_module, status="running")
        for logger in trainer.loggers:
            logger.log_hyperparams(hyperparameters(trainer, pl_module))

    def on_train_batch_start(self, *args: Any) -> None:
        """Time the steps alone, without validation and checkpoints."""
        self._batch_began = time.perf_counter()

    def on_train_batch_end(self, *args: Any) -> None:
        """Add a batch's time."""
        self.step_seconds += time.perf_counter() - self._batch_began

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the record and the adapter; also of a run that was killed after its last step."""
        folder = self._folder = run_folder(trainer)  # on every process, since it is a broadcast
        if folder is None:
            return
        model = getattr(pl_module, "model", pl_module)
        own = [p for layer in adapter_layers(model).values() for p in layer.own_parameters()]
        own += [p for p in model.parameters() if p.requires_grad]
        with distributed.gathered(model, own):
            if trainer.is_global_zero:
                self._finish(trainer, pl_module, folder)

    def _finish(self, trainer: Trainer, pl_module: LightningModule, folder: Path) -> None:
        if not self._started and _has_ended(folder / "run.json"):
            return
        if self.export_adapter:
            self._exported = take_away(getattr(pl_module, "model", pl_module), folder)
            rank_zero_info(self._exported)
        self._write(trainer, pl_module, status="finished")
        rank_zero_info(f"run record: {folder / 'run.json'}")

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Say in the record how the run ended."""
        # An earlier failure must not overwrite the record of the run to go on with.
        if self._started:
            how = "preempted" if isinstance(exception, Preempted) else "failed"
            self._write(trainer, pl_module, status=f"{how}: {exception}")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add the test's scores to the record in the folder, or begin one."""
        folder = run_folder(trainer)
        if not trainer.is_global_zero or folder is None:
            return
        path = folder / "run.json"
        with alone_at(path):  # tests of other tasks may run beside this one
            record = _read_json(path) or self._record(trainer, pl_module)
            record.setdefault("metrics", {}).update(numbers(trainer.callback_metrics))
            record["test_protocol"] = protocol(trainer)
            _write_json(path, record)

    def _write(self, trainer: Trainer, pl_module: LightningModule, status: str) -> None:
        if trainer.is_global_zero and self._folder is not None:
            record = {**self._record(trainer, pl_module), "status": status}
            _write_json(self._folder / "run.json", record)

    def _record(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        strategy = strategy_of(trainer)
        data = getattr(trainer, "datamodule", None)
        return {
            "strategy": type(strategy).__name__ if strategy else None,
            "arguments": arguments(strategy) if strategy else {},
            "model": getattr(pl_module, "model_name_or_path", None),
            "base": strategy.base_fingerprint if strategy else None,
            "protocol": protocol(trainer),
            "data_seed": getattr(data, "seed", None),
            "seed": torch.initial_seed(),
            "engine": engines.traits(trainer.strategy).name,
            "processes": trainer.world_size,
            "steps": trainer.global_step,
            "epochs": trainer.current_epoch,
            "parameters": {
                "start": self._start_parameters,
                "end": trainable_parameters(pl_module, include_saved=True),
                "total": sum(distributed.shape(p).numel() for p in pl_module.parameters()),
            },
            "ranks": {name: layer.rank for name, layer in _layers(pl_module).items()},
            "metrics": numbers(trainer.callback_metrics),
            "exported": self._exported,
            "changes": self.changes,
            "seconds": round(self.seconds, 2),
            "seconds_per_step": round(self.step_seconds / max(trainer.global_step, 1), 6),
            "peak_memory_mb": round(peak_memory_mb(), 1),
            "versions": versions(),
            "commit": commit(),
        }


def _has_ended(path: Path) -> bool:
    """Whether a record is of a run that came to its end; one that was killed is "running"."""
    return _read_json(path).get("status") == "finished"


def _layers(pl_module: LightningModule) -> dict[str, Any]:
    return adapter_layers(getattr(pl_module, "model", pl_module))


def _read_json(path: Path) -> dict[str, Any]:
    """A record that is there; empty without one."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise UserError(
            f"{path} is not JSON ({error}); move it away to have it made anew."
        ) from error
    if not isinstance(record, dict):
        raise UserError(f"{path} holds no record; move it away to have it made anew.")
    return record


def _write_json(path: Path, record: dict[str, Any]) -> None:
    write_text(path, json.dumps(record, indent=2, default=str) + "\n")
