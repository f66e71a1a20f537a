"""What a run was, how it ended, and what it leaves to take away.

``run.json``, and ``adapter/`` in PEFT's format; ``model/`` where a method trains the model's own
weights and has no adapter.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from lightning_peft import distributed, engines
from lightning_peft.adapters import adapter_layers, save_peft, trainable_parameters
from lightning_peft.atomic import write_atomically
from lightning_peft.callbacks.checkpoints import Preempted
from lightning_peft.strategies.base import AdapterStrategy

PACKAGES = ("torch", "lightning", "transformers", "torchmetrics", "datasets", "lightning-peft")


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
        self._folder = Path()

    def state_dict(self) -> dict[str, Any]:
        """Seconds until now, and the parameter count at the start."""
        return {
            "seconds": self.seconds,
            "step_seconds": self.step_seconds,
            "start_parameters": self._start_parameters,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self.seconds_before = state_dict["seconds"]
        self.step_seconds = state_dict["step_seconds"]
        self._start_parameters = state_dict["start_parameters"]

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
        # On every rank, since finding it is a broadcast; later on one process may be alone.
        self._folder = run_folder(trainer)
        self._write(trainer, pl_module, status="running")

    def on_train_batch_start(self, *args: Any) -> None:
        """Time the steps alone, without validation and checkpoints."""
        self._batch_began = time.perf_counter()

    def on_train_batch_end(self, *args: Any) -> None:
        """Add a batch's time."""
        self.step_seconds += time.perf_counter() - self._batch_began

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the record and the adapter; also of a run that was killed after its last step."""
        folder = self._folder = run_folder(trainer)  # on every rank, since it is a broadcast
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
        if (
            self._started
        ):  # an earlier failure must not overwrite the record of the run to go on with
            how = "preempted" if isinstance(exception, Preempted) else "failed"
            self._write(trainer, pl_module, status=f"{how}: {exception}")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add the test's scores to the record in the folder, or begin one."""
        path = run_folder(trainer) / "run.json"
        if not trainer.is_global_zero:
            return
        record = (
            json.loads(path.read_text()) if path.is_file() else self._record(trainer, pl_module)
        )
        record.setdefault("metrics", {}).update(_numbers(trainer.callback_metrics))
        record["test_protocol"] = _protocol(trainer)
        _write_json(path, record)

    def _write(self, trainer: Trainer, pl_module: LightningModule, status: str) -> None:
        if trainer.is_global_zero:
            record = {**self._record(trainer, pl_module), "status": status}
            _write_json(self._folder / "run.json", record)

    def _record(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        strategy = next((c for c in callbacks if isinstance(c, AdapterStrategy)), None)
        data = getattr(trainer, "datamodule", None)
        return {
            "strategy": type(strategy).__name__ if strategy else None,
            "arguments": _arguments(strategy) if strategy else {},
            "model": getattr(pl_module, "model_name_or_path", None),
            "base": strategy.base_fingerprint if strategy else None,
            "protocol": _protocol(trainer),
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
            "metrics": _numbers(trainer.callback_metrics),
            "exported": self._exported,
            "seconds": round(self.seconds, 2),
            "seconds_per_step": round(self.step_seconds / max(trainer.global_step, 1), 6),
            "peak_memory_mb": round(_peak_memory_mb(), 1),
            "versions": {"python": platform.python_version(), **_versions()},
            "commit": _commit(),
        }


def run_folder(trainer: Trainer) -> Path:
    """Where a run leaves its files: the first logger's folder, or the trainer's root."""
    return Path(trainer.log_dir or trainer.default_root_dir)


def _has_ended(path: Path) -> bool:
    """Whether a record is of a run that came to its end; one that was killed is "running"."""
    return path.is_file() and json.loads(path.read_text()).get("status") == "finished"


def take_away(model: nn.Module, folder: Path) -> str:
    """Write what a trained model leaves to take away.

    Args:
        model: The trained model.
        folder: Where ``adapter/`` or ``model/`` is made.

    Returns:
        What was written, or why nothing was, for the record.
    """
    layers = adapter_layers(model)
    alive = [layer for layer in layers.values() if layer.rank != 0]
    unknown = next((layer for layer in alive if layer.peft() is None), None)
    if unknown is not None:
        return (
            f"nothing: PEFT has no form for {type(unknown).__name__}; lightning-peft export "
            "--merge writes the merged model"
        )
    if alive:
        return f"adapter (PEFT format): {save_peft(model, folder / 'adapter')}"
    if layers:
        return "nothing: every layer has lost all its components"
    if not hasattr(model, "save_pretrained"):
        return "nothing: there is no adapter, and the model has no save_pretrained"
    part = folder / ".model.part"
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part)  # type: ignore[operator]
    shutil.rmtree(folder / "model", ignore_errors=True)
    part.replace(folder / "model")
    return f"model (its own weights were trained, so there is no adapter): {folder / 'model'}"


def _layers(pl_module: LightningModule) -> dict[str, Any]:
    return adapter_layers(getattr(pl_module, "model", pl_module))


def _write_json(path: Path, record: dict[str, Any]) -> None:
    text = json.dumps(record, indent=2, default=str) + "\n"
    write_atomically(path, lambda part: part.write_text(text))


def _numbers(metrics: dict[str, Any]) -> dict[str, float]:
    return {key: float(value) for key, value in metrics.items()}


def _arguments(strategy: AdapterStrategy) -> dict[str, Any]:
    """The strategy's public plain attributes, which are its constructor's arguments."""
    plain = (int, float, str, bool, list, type(None))
    hidden = {"decisions", "model", "base_fingerprint"}
    items = vars(strategy).items()
    return {
        k: v for k, v in items if isinstance(v, plain) and not k.startswith("_") and k not in hidden
    }


def _protocol(trainer: Trainer) -> str | None:
    return getattr(getattr(getattr(trainer, "datamodule", None), "protocol", None), "name", None)


def _peak_memory_mb() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def _commit() -> str | None:
    """The commit of the working folder's repository, marked where files have changed since."""
    try:
        head = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return head.stdout.strip()
