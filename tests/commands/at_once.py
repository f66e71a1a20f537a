"""Commands in processes of their own, begun at the same moment."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Callback

from lightning_peft.cli import main


class Wait(Callback):
    """Begins to train when a file is there, so that a test decides who meets whom.

    Args:
        file: Its path; after a minute without it the run fails.
    """

    def __init__(self, file: str) -> None:
        self.file = Path(file)

    def on_train_start(self, *args: Any) -> None:
        until = time.monotonic() + 60
        while not self.file.exists():
            assert time.monotonic() < until
            time.sleep(0.01)


def small_fit(base: Path, root: Path, **trainer: Any) -> dict[str, Any]:
    """The configuration of a fit that takes a second."""
    return {
        "trainer": {
            "accelerator": "cpu",
            "default_root_dir": str(root),
            "max_steps": 8,
            "limit_val_batches": 1,
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
            **trainer,
        },
        "model": {
            "class_path": "CausalLMModule",
            "init_args": {
                "model_name_or_path": str(base),
                "adapter": {"class_path": "DropLoRA", "init_args": {"r": 4, "p": 0.5}},
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-2}},
            },
        },
        "data": {
            "class_path": "ArithmeticDataModule",
            "init_args": {"train_size": 64, "val_size": 8, "test_size": 8, "batch_size": 4},
        },
        "checkpoint": {"every_n_train_steps": 2},
    }


def write(path: Path, config: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(config))
    return path


def begin(words: list[Any], log: Path, at: float = 0.0) -> int:
    """Run a command in a forked process, from a moment on, and give its number."""
    child = os.fork()
    if child:
        return child
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    code = 1
    try:
        sys.argv = ["lightning-peft"]
        time.sleep(max(at - time.time(), 0))
        main([str(word) for word in words])
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def end(child: int) -> int:
    """Wait for a process, and give its exit status."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def end_one(children: list[int]) -> tuple[int, int]:
    """Wait until one of several processes ends: its place among them, and its exit status."""
    while True:
        for place, child in enumerate(children):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return place, os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
