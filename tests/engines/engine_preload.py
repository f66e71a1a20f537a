"""What every process of a test would import, made once: they are forks of the one that has it."""

from __future__ import annotations

import contextlib
import os

import torch

# Threads would not be there in the forks.
torch.set_num_threads(1)
os.environ.setdefault("DS_ACCELERATOR", "cpu")
with contextlib.suppress(ImportError):
    import deepspeed  # noqa: F401

import engine_worker  # noqa: E402

engine_worker.tiny_llama()  # a thousand modules are imported when the first model is made
