"""The embedded model: a real LLaMA of about a million parameters, for any machine."""

from __future__ import annotations

from pathlib import Path

TINY_LLAMA = Path(__file__).parent / "tiny_llama"


def resolve_model(name_or_path: str) -> str:
    """The folder of the embedded model for its name ``tiny_llama``, and any other name as it is.

    Args:
        name_or_path: As the user gave it.

    Returns:
        What ``from_pretrained`` takes.
    """
    embedded = name_or_path == TINY_LLAMA.name and not Path(name_or_path).exists()
    return str(TINY_LLAMA) if embedded else name_or_path
