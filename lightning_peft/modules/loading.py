"""Loading a base model, with an answer in one sentence where that fails."""

from __future__ import annotations

from pathlib import Path
from typing import Any

DTYPES = ("auto", "float32", "bfloat16", "float16")


def load_causal_lm(name: str, dtype: str = "auto", attn_implementation: str | None = None) -> Any:
    """Load a causal language model by ``AutoModelForCausalLM.from_pretrained``.

    Args:
        name: A folder or a hub name.
        dtype: One of ``auto``, ``float32``, ``bfloat16``, ``float16``.
        attn_implementation: As in transformers.

    Returns:
        The model, in training mode.

    Raises:
        ValueError: If ``dtype`` is none of these, or the model cannot be loaded from there.
    """
    from transformers import AutoModelForCausalLM

    if dtype not in DTYPES:
        raise ValueError(f"model.dtype must be one of {', '.join(DTYPES)}, got {dtype!r}.")
    folder = Path(name)
    looks_local = name.startswith((".", "/", "~")) or name.count("/") != 1
    if looks_local and not folder.is_dir():
        raise ValueError(f"model.model_name_or_path: the folder {name} does not exist.")
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ValueError(f"model.model_name_or_path: {name} holds no config.json, so it is no model.")
    extra = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **extra)
    except OSError as error:
        reason = " ".join(str(error).split())
        if folder.is_dir() and "no file named" in reason:
            reason = "it has a config.json but no weights (model.safetensors)"
        raise ValueError(f"model.model_name_or_path: {name} cannot be loaded: {reason}") from error
    return model.train()
