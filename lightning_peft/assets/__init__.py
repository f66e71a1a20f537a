"""Base models that need no hub: an embedded one, those in wheels, and llama.cpp's files."""

from __future__ import annotations

from pathlib import Path

from lightning_peft.assets.gguf import converted
from lightning_peft.assets.wheels import WHEELS

TINY_LLAMA = Path(__file__).parent / "tiny_llama"


def resolve_model(name_or_path: str) -> str:
    """What ``from_pretrained`` takes for a model's name.

    Args:
        name_or_path: ``tiny_llama`` (embedded), ``smollm2`` or ``minilm`` (each in a wheel of its
            own), a ``.gguf`` file, or any other name.

    Returns:
        A folder; any other name, and the name of a folder that is there, as it is. A ``.gguf`` file
        is converted once, into a cache (:func:`~lightning_peft.assets.gguf.converted`).

    Raises:
        UserError: If a wheel is not installed or lacks its model, or a file cannot be converted.
    """
    if Path(name_or_path).is_dir():
        return name_or_path
    if name_or_path == TINY_LLAMA.name:
        return str(TINY_LLAMA)
    wheel = WHEELS.get(name_or_path)
    name = str(wheel.find(name_or_path)) if wheel else name_or_path
    return str(converted(Path(name))) if name.endswith(".gguf") else name
