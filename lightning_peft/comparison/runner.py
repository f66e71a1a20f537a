"""Doing a comparison's jobs: which are due, in how many processes, and what stands already."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from lightning_peft.comparison.outcomes import Outcomes
from lightning_peft.comparison.plan import Job, Plan
from lightning_peft.comparison.worker import RESULT, Task, read_result, work, write_result
from lightning_peft.errors import UserError
from lightning_peft.settings.resume import differences
from lightning_peft.settings.tree import read_file


def run_jobs(plan: Plan, retry_failed: bool = False) -> None:
    """Do every job that is not done, in ``workers`` processes.

    Args:
        plan: The comparison.
        retry_failed: Whether jobs that failed before are tried again.

    Raises:
        UserError: If the folder holds jobs with other settings, or another process works there.
    """
    plan.folder.mkdir(parents=True, exist_ok=True)
    with _alone_in(plan.folder):
        outcomes = Outcomes(plan)
        _check_settings(plan)
        if retry_failed:
            _forget_failures(plan)
        _Processes(plan, outcomes).run()


class _Processes:
    """The processes that are at work."""

    def __init__(self, plan: Plan, outcomes: Outcomes) -> None:
        self.plan, self.outcomes = plan, outcomes
        self.context = multiprocessing.get_context("forkserver")
        # Imports what every run needs once; each job is then a fork that begins at once.
        self.context.set_forkserver_preload(["lightning_peft.comparison.preload"])
        workers = plan.comparison.workers
        self.threads = plan.comparison.threads or max((os.cpu_count() or 1) // workers, 1)
        self.devices = _devices(workers)
        self.running: dict[int, tuple[Job, BaseProcess, float]] = {}

    def run(self) -> None:
        before = signal.getsignal(signal.SIGTERM)
        signal.signal(signal.SIGTERM, _stop)
        try:
            while self._start() or self.running:
                self._wait()
        except KeyboardInterrupt:
            raise SystemExit("stopped; start it again to go on.") from None
        finally:
            for _, process, _ in self.running.values():
                process.kill()
            signal.signal(signal.SIGTERM, before)

    def _start(self) -> bool:
        """Fill the free places; whether anything is at work."""
        at_work = {job for job, _, _ in self.running.values()}
        due = [(job, test) for job, test in self.outcomes.due() if job not in at_work]
        free = [i for i in range(self.plan.comparison.workers) if i not in self.running]
        for place, (job, test) in zip(free, due, strict=False):
            task = Task(
                self.plan.folder_of(job),
                self.plan.settings_of(job),
                self.plan.comparison.checkpoint if test else None,
                self.threads,
                self.devices[place % len(self.devices)] if self.devices else None,
            )
            # A daemon may have no children, and a loader's workers are such.
            process = self.context.Process(target=work, args=(task,), daemon=False)
            process.start()
            self.running[place] = (job, process, time.perf_counter())
        return bool(self.running)

    def _wait(self) -> None:
        """Wait until a process ends, and say what came out."""
        wait([process.sentinel for _, process, _ in self.running.values()])
        for place, (job, process, began) in list(self.running.items()):
            if process.exitcode is None:
                continue
            del self.running[place]
            folder = self.plan.folder_of(job)
            if process.exitcode and read_result(folder).get("status") != "failed":
                signal_ = -process.exitcode
                how = f"by signal {signal_}" if signal_ > 0 else f"with code {process.exitcode}"
                memory = " (out of memory?)" if signal_ == signal.SIGKILL else ""
                write_result(folder, "failed", f"its process was ended {how}{memory}")
            self.outcomes.read(job)
            done, known = self.outcomes.progress()
            seconds = time.perf_counter() - began
            said = self.outcomes.sentence(job)
            print(f"[{done}/{known}] {job.label}: {said}, {seconds:.0f} s", flush=True)


def _stop(*_: Any) -> None:
    raise KeyboardInterrupt


def _devices(workers: int) -> list[str]:
    """The GPUs among which workers are shared out; none where there is one worker, or no GPU."""
    import torch

    if workers == 1 or not torch.cuda.is_available():
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"folder: another process runs the comparison in {folder}; wait, or give another."
            ) from None
        yield


def _check_settings(plan: Plan) -> None:
    """Refuse to go on with jobs that were begun with other settings."""
    for job in Outcomes.all_jobs(plan):
        path = plan.folder_of(job) / "settings.yaml"
        if not path.is_file():
            continue
        old, new = read_file(str(path), Path()), plan.settings_of(job)
        if change := next(differences(old, new), None):
            raise UserError(
                f"folder: {plan.folder} holds {job.label} with {change['key']} = {change['old']}, "
                f"which is {change['new']} now; give another folder, or remove that one."
            )


def _forget_failures(plan: Plan) -> None:
    for job in Outcomes.all_jobs(plan):
        folder = plan.folder_of(job)
        if read_result(folder).get("status") == "failed":
            (folder / RESULT).unlink()
