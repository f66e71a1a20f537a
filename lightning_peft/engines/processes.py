"""What a process of a job does about the one that started it: the job's first one, or torchrun."""

from __future__ import annotations

import importlib
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.distributed import PrefixStore

LOST = (
    "another process of this job has ended, so this one ends too; its own output says why. "
    "Go on from the last checkpoint with --ckpt_path last."
)
_FIRST = "LIGHTNING_PEFT_FIRST_PROCESS"


@contextmanager
def watch_first(patience: float = 60) -> Iterator[None]:
    """Within, have this process end soon after the first one of its job, if that one started it.

    Lightning's first process looks after those that it starts, and nobody after it: if it is
    killed, they wait for half an hour to meet it, or in a sum over GPUs. Those started by torchrun
    or SLURM are looked after by these.

    Args:
        patience: Seconds in which a process may end by itself, by an error that says more or
            because the job has come to its end.
    """
    done = threading.Event()
    started_by_first = {"LOCAL_RANK", _FIRST} <= os.environ.keys()
    if started_by_first and "TORCHELASTIC_RUN_ID" not in os.environ:
        first = int(os.environ[_FIRST])  # may have gone already
        threading.Thread(target=_outlive, args=(first, patience, done), daemon=True).start()
    else:
        os.environ[_FIRST] = str(os.getpid())  # those that this one starts find it there
    try:
        yield
    finally:
        done.set()


def _outlive(first: int, patience: float, done: threading.Event) -> None:
    while os.getppid() == first:
        if done.wait(1):
            return
    if not done.wait(patience):
        print(f"error: {LOST}", file=sys.stderr, flush=True)
        os._exit(2)


def forget_earlier_starts() -> None:
    """Have processes that torchrun has started again find each other, not those that have gone.

    It keeps one store for all its starts, in which torch (2.13) takes what an earlier one wrote to
    be this one's: processes then connect to addresses at which nobody listens any more.
    """
    start = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    # torch.distributed has a function of the module's name.
    rendezvous: Any = importlib.import_module("torch.distributed.rendezvous")
    make = getattr(rendezvous, "_create_c10d_store", None)
    if start and make is not None:

        def make_anew(*args: Any, **kwargs: Any) -> PrefixStore:
            return PrefixStore(f"start {start}", make(*args, **kwargs))

        rendezvous._create_c10d_store = make_anew


def explain(error: BaseException) -> str | None:
    """What went wrong between processes, in one sentence; None for other errors."""
    text = " ".join(str(error).split())
    if "EADDRINUSE" in text or "address already in use" in text.lower():
        port = os.environ.get("MASTER_PORT", "of the rendezvous")
        return (
            f"the port {port}, by which the processes find each other, is in use; set MASTER_PORT "
            "to a free one, or unset it to have one chosen."
        )
    lost = ("Connection closed by peer", "Connection reset by peer", "remote process has failed")
    if any(sign in text for sign in lost):
        return LOST
    return None
