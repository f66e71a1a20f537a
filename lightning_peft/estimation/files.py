"""Sizes of the files that a run writes: a checkpoint, and the weights to take away."""

from __future__ import annotations

import io
import json
import math
from typing import Any

import torch
from torch import Tensor

from lightning_peft.adapters import adapter_layers
from lightning_peft.adapters.peft_format import peft_state, without_peft
from lightning_peft.estimation.memory import nbytes, value_bytes


def checkpoint_bytes(kept: list[Tensor], state: list[Tensor]) -> int:
    """Bytes of a checkpoint's file.

    Args:
        kept: Tensors of the adapted model that a checkpoint holds.
        state: Those of the optimizer.
    """
    return nbytes(kept) + value_bytes(state) + _overhead([*kept, *state])


def export_bytes(model: Any) -> int | None:
    """Bytes of the safetensors file that a run leaves; None where PEFT's format cannot hold it.

    Args:
        model: The model at the end of the run: its adapters, or all of it where it has none.
    """
    if without_peft(model) is not None:
        return None
    tensors = peft_state(model) if adapter_layers(model) else model.state_dict()
    header = {
        name: {"dtype": "F32", "shape": list(t.shape), "data_offsets": [10**7, 10**7]}
        for name, t in tensors.items()
    }
    length = math.ceil(len(json.dumps(header, separators=(",", ":"))) / 8) * 8
    return value_bytes(tensors.values()) + 8 + length


def _overhead(tensors: list[Tensor]) -> int:
    """Bytes of a checkpoint's file beside its values: names, zip entries, random state."""
    buffer = io.BytesIO()
    names = {
        f"model.model.layers.{i:08}.self_attn.q_proj.weight": torch.zeros(1) for i in range(64)
    }
    torch.save(names, buffer)
    return 64_000 + len(tensors) * len(buffer.getvalue()) // 64
