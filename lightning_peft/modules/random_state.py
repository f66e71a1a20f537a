"""Random state in a form that ``torch.load(weights_only=True)`` takes."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def get_random_state() -> dict[str, Any]:
    """The state of torch's (all devices), Python's and NumPy's global streams."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
    }


def set_random_state(states: Any, process: int = 0) -> None:
    """Take back what :func:`get_random_state` gave on each process.

    A process that was not there when the states were taken goes on from the first one's, offset. A
    checkpoint from another number of GPUs leaves their streams as they are.

    Args:
        states: The state of each process; or one process' own.
        process: Which this is.
    """
    states = states if isinstance(states, list) else [states]
    state = states[process if process < len(states) else 0]
    torch.set_rng_state(state["torch"])
    if len(state["cuda"]) == torch.cuda.device_count() > 0:
        torch.cuda.set_rng_state_all(state["cuda"])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    if process >= len(states):
        offset_random_state(process)


def offset_random_state(process: int) -> None:
    """Let each process draw masks of its own, repeatably; the first goes on as if alone.

    All processes begin with one stream, in which they have initialised the same adapters.
    """
    if process == 0:
        return
    seed = int(torch.randint(2**31, ())) + process
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)
