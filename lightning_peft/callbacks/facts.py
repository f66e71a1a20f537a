"""What a run's record says of the run and of the machine."""

from __future__ import annotations

import importlib.metadata
import platform
import resource
import subprocess
import sys
from typing import Any

import torch
from lightning.pytorch import Trainer

from lightning_peft.strategies.base import AdapterStrategy

PACKAGES = ("torch", "lightning", "transformers", "torchmetrics", "datasets", "lightning-peft")


def numbers(metrics: dict[str, Any]) -> dict[str, float]:
    """Metrics as plain numbers, ready for JSON."""
    return {key: float(value) for key, value in metrics.items()}


def arguments(strategy: AdapterStrategy) -> dict[str, Any]:
    """The strategy's public plain attributes, which are its constructor's arguments."""
    plain = (int, float, str, bool, list, type(None))
    hidden = {"decisions", "model", "base_fingerprint"}
    items = vars(strategy).items()
    return {
        k: v for k, v in items if isinstance(v, plain) and not k.startswith("_") and k not in hidden
    }


def protocol(trainer: Trainer) -> str | None:
    """Name of the protocol of the run's data, where they have one."""
    return getattr(getattr(getattr(trainer, "datamodule", None), "protocol", None), "name", None)


def peak_memory_mb() -> float:
    """The most memory that this process held so far: of its GPU, or else of the machine, in MiB."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def versions() -> dict[str, str]:
    """Of Python and of the packages that numbers depend on."""
    found = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"python": platform.python_version(), **found}


def commit() -> str | None:
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
