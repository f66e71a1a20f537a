"""What a process does that torchrun, or the first process of its job, has started."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys

import pytest
from torch.distributed import HashStore

from lightning_peft import engines
from lightning_peft.engines.processes import forget_earlier_starts, watch_first


def test_a_port_in_use_and_a_lost_process_are_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_PORT", "29500")
    taken = RuntimeError("The server socket has failed to listen … port: 29500, EADDRINUSE")
    assert "the port 29500, by which the processes find each other" in str(engines.explain(taken))
    lost = RuntimeError("[gloo/transport/tcp/pair.cc:540] Connection closed by peer [127.0.0.1]")
    assert "another process of this job has ended" in str(engines.explain(lost))
    assert engines.explain(ValueError("something else")) is None


def test_processes_that_are_started_again_do_not_see_what_earlier_ones_wrote(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rendezvous = importlib.import_module("torch.distributed.rendezvous")
    kept = HashStore()  # as torchrun keeps one over its starts
    seen = []
    for start in range(3):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(start))
        monkeypatch.setattr(rendezvous, "_create_c10d_store", lambda: kept)
        forget_earlier_starts()
        store = rendezvous._create_c10d_store()
        seen.append(store.check(["address"]))
        store.set("address", f"of start {start}")
    assert seen == [False, False, False]


FIRST = "LIGHTNING_PEFT_FIRST_PROCESS"
STARTED = """
import time
from lightning_peft.engines.processes import watch_first
with watch_first(patience=0.1):
    print("watching", flush=True)
    time.sleep(60)
"""


def test_a_first_process_tells_those_that_it_starts_who_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(FIRST, raising=False)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with watch_first():
        assert os.environ[FIRST] == str(os.getpid())


def test_a_process_ends_soon_after_the_first_one_of_its_job() -> None:
    environment = {**os.environ, FIRST: "-1", "LOCAL_RANK": "1"}  # which has gone
    environment.pop("TORCHELASTIC_RUN_ID", None)
    done = subprocess.run(
        [sys.executable, "-c", STARTED], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "error: another process of this job has ended" in done.stderr
