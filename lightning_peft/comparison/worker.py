"""One job in a process of its own: fit, and test where that is asked for."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import traceback
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import yaml

from lightning_peft.atomic import write_text

RESULT = "result.json"


@dataclass(frozen=True)
class Task:
    """What a process has to do.

    Attributes:
        folder: The job's.
        settings: Whole configuration of ``fit``.
        test: A checkpoint to test (``last`` or a file in ``checkpoints/``), or None.
        threads: Processor threads.
        device: A GPU's number, or None to leave the choice to the trainer.
    """

    folder: Path
    settings: dict[str, Any]
    test: str | None
    threads: int
    device: str | None


def work(task: Task) -> None:
    """Do a task and leave ``result.json``; whatever happens, the other jobs go on.

    Args:
        task: What to do.
    """
    _die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is for the process that waits for us
    task.folder.mkdir(parents=True, exist_ok=True)
    with (task.folder / "log.txt").open("ab", buffering=0) as log:
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    os.environ["OMP_NUM_THREADS"] = str(task.threads)
    if task.device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = task.device
    try:
        _fit_and_test(task)
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        reason = " ".join(str(error).split()) or type(error).__name__
        write_result(task.folder, "failed", reason if len(reason) <= 400 else reason[:400] + " …")
    sys.stdout.flush()
    sys.stderr.flush()


def _fit_and_test(task: Task) -> None:
    import torch

    from lightning_peft.runs import find_last
    from lightning_peft.settings.cli import make_cli

    torch.set_num_threads(task.threads)
    settings = task.folder / "settings.yaml"
    if read_result(task.folder).get("status") != "fitted":
        text = yaml.safe_dump(task.settings, sort_keys=False)
        write_text(settings, text)
        words = ["fit", "--config", str(settings)]
        try:
            find_last(task.folder)
            words += ["--ckpt_path", "last"]
        except FileNotFoundError:  # begun or not, nothing is there to go on from
            for version in task.folder.glob("version_*"):
                shutil.rmtree(version)
        make_cli(words)
        write_result(task.folder, "fitted")
    if task.test is None:
        return
    checkpoint = task.test
    if checkpoint != "last":
        checkpoint = str(find_last(task.folder).parent / checkpoint)
    make_cli(["test", "--config", str(settings), "--ckpt_path", checkpoint])
    write_result(task.folder, "done")


def write_result(folder: Path, status: str, reason: str = "") -> None:
    """Say how a job stands: ``fitted``, ``done`` or ``failed`` and why.

    Args:
        folder: The job's.
        status: One of the three.
        reason: Of a failure.
    """
    text = json.dumps({"status": status, **({"reason": reason} if reason else {})}) + "\n"
    write_text(folder / RESULT, text)


def read_result(folder: Path) -> dict[str, Any]:
    """What :func:`write_result` wrote; empty where a job has not come to an end.

    Args:
        folder: The job's.
    """
    path = folder / RESULT
    return json.loads(path.read_text()) if path.is_file() else {}


def _die_with_parent() -> None:
    """End this process when the one that runs the comparison is gone, however it went.

    Its own parent in the kernel's sense is the server that forks, which lives as long as we do.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
