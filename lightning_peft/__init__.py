"""Try, compare and publish pruning ideas for LoRA, on PyTorch Lightning."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_peft.adapters import (  # type: ignore[no-redef]
        load_peft,
        merge,
        save_peft,
        trainable_parameters,
    )
    from lightning_peft.modules import CausalLMModule, SequenceClassificationModule
    from lightning_peft.strategies import AdapterStrategy

__version__ = "0.1.0"

_HOMES = {
    "AdapterStrategy": "lightning_peft.strategies",
    "CausalLMModule": "lightning_peft.modules",
    "SequenceClassificationModule": "lightning_peft.modules",
    "load_peft": "lightning_peft.adapters",
    "merge": "lightning_peft.adapters",
    "save_peft": "lightning_peft.adapters",
    "trainable_parameters": "lightning_peft.adapters",
}
__all__ = [
    "AdapterStrategy",
    "CausalLMModule",
    "SequenceClassificationModule",
    "load_peft",
    "merge",
    "save_peft",
    "trainable_parameters",
]


def __getattr__(name: str) -> Any:
    """Import a name when it is asked for, so that ``import lightning_peft`` costs nothing."""
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'lightning_peft' has no attribute {name!r}")
