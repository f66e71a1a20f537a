"""What a trained model leaves to take away.

``adapter/`` in PEFT's format; ``model/`` where a method trains the model's own weights and has no
adapter.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from lightning_peft.adapters import adapter_layers, save_peft
from lightning_peft.adapters.peft_format import without_peft
from lightning_peft.atomic import write_folder


def take_away(model: nn.Module, folder: Path) -> str:
    """Write what a trained model leaves to take away.

    Args:
        model: The trained model.
        folder: Where ``adapter/`` or ``model/`` is made.

    Returns:
        What was written, or why nothing was, for the record.
    """
    layers = adapter_layers(model)
    reason = without_peft(model)
    if reason is not None:
        return f"nothing: {reason}; lightning-peft export --merge writes the merged model"
    if any(layer.rank != 0 for layer in layers.values()):
        write_folder(folder / "adapter", lambda part: save_peft(model, part), over=True)
        return f"adapter (PEFT format): {folder / 'adapter'}"
    if layers:
        return "nothing: every layer has lost all its components"
    if not hasattr(model, "save_pretrained"):
        return "nothing: there is no adapter, and the model has no save_pretrained"
    write_folder(folder / "model", model.save_pretrained, over=True)  # type: ignore[arg-type]
    return f"model (its own weights were trained, so there is no adapter): {folder / 'model'}"
