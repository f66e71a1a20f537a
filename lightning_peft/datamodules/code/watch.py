"""The caller's side while a program runs: what comes from the child, and when it is over."""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import time
import warnings

from lightning_peft.datamodules.code.limits import Limits, excess
from lightning_peft.errors import UserError

START_SECONDS = 60  # for the interpreter and the barriers, before the program's own time begins
POLL_SECONDS = 0.02
SIGNALS = {number.value: number.name for number in signal.Signals}


class Pipes:
    """What comes from the child: lines of results, and output, which is counted."""

    def __init__(self, process: subprocess.Popen[bytes], results: int) -> None:
        assert process.stdout is not None
        self.process, self.results = process, results
        self.said, self.output, self.written = b"", b"", 0
        self.selector = selectors.DefaultSelector()
        self.selector.register(results, selectors.EVENT_READ)
        self.selector.register(process.stdout.fileno(), selectors.EVENT_READ)

    def read(self) -> bool:
        """Read what is there; return whether the child has ended and all has been read."""
        ended = self.process.poll() is not None  # before reading, so that its last words are read
        events = self.selector.select(0 if ended else POLL_SECONDS)
        for key, _ in events:
            data = os.read(key.fd, 1 << 16)
            self.written += len(data)
            if not data:
                self.selector.unregister(key.fd)
            elif key.fd == self.results:
                self.said += data
            else:
                self.output = (self.output + data)[-1000:]
        return ended and not events

    def close(self) -> None:
        """Close the selector; the pipes are the caller's."""
        self.selector.close()

    def line(self, number: int) -> str | None:
        """Return a line of the results once it is whole."""
        lines = self.said.split(b"\n")
        return lines[number].decode("utf-8", "replace") if number < len(lines) - 1 else None


def watch(pipes: Pipes, folder: str, limits: Limits) -> str:
    """Wait for the token or for the reason of a failure, whatever the program does meanwhile.

    Args:
        pipes: What comes from the child.
        folder: The program's working folder.
        limits: What it may use.

    Raises:
        UserError: The child cannot put a barrier up; it says which and why.
    """
    process = pipes.process
    deadline = time.monotonic() + START_SECONDS
    while pipes.line(0) is None:
        if pipes.read() or time.monotonic() > deadline:
            last = pipes.output.decode("utf-8", "replace").strip().rpartition("\n")[2]
            _check_barriers(
                f"refused {last or f'the interpreter did not start ({process.poll()})'}"
            )
    _check_barriers(pipes.line(0) or "")
    deadline = time.monotonic() + limits.seconds
    while True:
        ended = pipes.read()
        verdict = excess(process.pid, folder, pipes.written, limits) or pipes.line(1)
        if verdict:
            return verdict
        if ended:
            return _ending(process.returncode, limits)
        if time.monotonic() > deadline:
            return f"timed out after {limits.seconds:g} s"


def _check_barriers(report: str) -> None:
    """Raise where the child refused to go on, and warn where it holds by audit hooks."""
    word, _, rest = report.partition(" ")
    if word != "ready":
        raise UserError(f"Generated programs cannot be shut in on this machine: {rest}.")
    if "audit" in rest.split():
        warnings.warn(
            f"Generated programs are held by {rest.replace(' ', ', ')} alone: without Landlock 3 "
            "(Linux 6.2) it is Python's audit hooks that guard the files, on macOS everything, "
            "and native code can evade them.",
            stacklevel=2,
        )


def _ending(code: int, limits: Limits) -> str:
    """Say how a process ended that never said that it passed."""
    if code == -signal.SIGXCPU:
        return f"timed out after {limits.seconds:g} s of processor time"
    if code < 0:
        return f"killed by {SIGNALS.get(-code, f'signal {-code}')}"
    return f"exited with code {code} before its end"
