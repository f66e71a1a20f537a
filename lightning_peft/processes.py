"""What a process of a job does when the one that started it has gone."""

from __future__ import annotations

import os
import sys
import threading
import time

LOST = (
    "another process of this job has ended, so this one ends too; its own output says why. "
    "Go on from the last checkpoint with --ckpt_path last."
)
_FIRST = "LIGHTNING_PEFT_FIRST_PROCESS"


def watch_first(patience: float = 30) -> None:
    """Have this process end soon after the first one of its job, if that one has started it.

    Lightning's first process looks after those that it starts, and nobody after it: if it is
    killed, they wait for half an hour to meet it, or in a sum over GPUs. Those started by torchrun
    or SLURM are looked after by these.

    Args:
        patience: Seconds in which a process may end by itself, by an error that says more or
            because the job has come to its end.
    """
    started_by_first = {"LOCAL_RANK", _FIRST} <= os.environ.keys()
    if started_by_first and "TORCHELASTIC_RUN_ID" not in os.environ:
        first = int(os.environ[_FIRST])  # may have gone already
        threading.Thread(target=_outlive, args=(first, patience), daemon=True).start()
    else:
        os.environ[_FIRST] = str(os.getpid())  # those that this one starts find it there


def _outlive(first: int, patience: float) -> None:
    while os.getppid() == first:
        time.sleep(1)
    time.sleep(patience)
    print(f"error: {LOST}", file=sys.stderr, flush=True)
    os._exit(2)
