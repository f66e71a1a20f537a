"""Running what a model wrote, and taking it out of what it said.

A generated program is untrusted. It is run only where the user set ``allow_code_execution: true``,
which is for the caller to check, and then in a process of its own (`sandbox_child`) behind these:

* limits of time, memory, threads, files, bytes in files and bytes of output, and an environment
  that holds none of the caller's variables but ``LD_LIBRARY_PATH``;
* seccomp: no further processes, no sockets but pairs within the program, no signals to others, no
  changes of modes or owners, no folders, links or shared memory, and none of the newer calls of the
  kernel. It binds root, which has lost its capabilities besides;
* Landlock: reading only the interpreter's folders, the system's libraries and the working folder,
  and writing only files in that folder, which is fresh, and removed afterwards;
* where Landlock is missing or older than its version 3 (Linux 6.2), Python's audit hooks, which
  guard the files as well.

Linux without seccomp, or on another machine than x86-64 and arm64, is refused, and so is Windows.

What this does not do. Correct programs that start processes or make folders fail. The names and
sizes of files outside can be seen, though not what is in them. A file that is removed while open
counts for its own limit alone, so that 64 times `file_bytes` may be taken until the program ends.
Audit hooks hold against Python, not against native code that looks for a way around them; on macOS
they are all there is beside the limits, and memory and threads are not limited there. Neither is
silent: there is a warning. A program that ends before its last line has not passed, whatever its
exit code, since only then the child writes a random token; one that goes looking through the
child's frames could find it, and one that changes what ``assert`` sees needs no token. This is for
models that solve problems or fail to, not for one that sets out to defeat its tests.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import re
import secrets
import selectors
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path

from lightning_peft.errors import UserError

CHILD = Path(__file__).with_name("sandbox_child.py")
PLATFORM = sys.platform
# What is asked of the kernel; a test takes some away.
LAYERS = ("landlock", "seccomp") if PLATFORM == "linux" else ()
START_SECONDS = 60  # for the interpreter and the barriers, before the program's own time begins
POLL_SECONDS = 0.02
SIGNALS = {number.value: number.name for number in signal.Signals}
SYSTEM_FILES = (
    "/lib",
    "/lib64",
    "/usr/lib",
    "/usr/lib64",
    "/usr/local/lib",
    "/usr/share/zoneinfo",
    "/etc/ld.so.cache",
    "/etc/localtime",
    "/dev/urandom",
    "/dev/zero",
)

FENCED = re.compile(r"```([^\n`]*)\n(.*?)(?:```|\Z)", re.DOTALL)
RANK = {"python": 0, "python3": 0, "py": 0, "": 1}  # of a block's mark; others are no solution
AFTER_SOLUTION = re.compile(r"^(?:if __name__|# Example usage|assert\b)", re.MULTILINE)


@dataclass(frozen=True)
class Limits:
    """What one program may use.

    Args:
        seconds: Wall time, and processor time rounded up, from the program's first line on.
        memory_bytes: Address space, the interpreter's some 30 MiB included.
        threads: Threads at once. There are no further processes.
        files: Files at once in the working folder, which has no folders in it.
        file_bytes: Bytes in one file, and on the disk in the whole folder.
        output_bytes: Bytes written to stdout and stderr together.
    """

    seconds: float = 10.0
    memory_bytes: int = 1 << 30
    threads: int = 32
    files: int = 64
    file_bytes: int = 16 << 20
    output_bytes: int = 1 << 20

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) <= 0:
                raise UserError(
                    f"{field.name} is {getattr(self, field.name)}; it has to be more than 0."
                )


@dataclass(frozen=True)
class Outcome:
    """How a program went.

    Args:
        passed: Whether it ran to the end of its last line.
        reason: ``passed``, or in one line what stopped it: ``AssertionError: assert f(1) == 2``,
            ``timed out after 10 s``, ``memory``, ``killed by SIGSEGV``.
    """

    passed: bool
    reason: str


_DEFAULT = Limits()


def run_program(source: str, limits: Limits = _DEFAULT) -> Outcome:
    """Run one program, a solution and its tests together, and see whether it ends well.

    Nothing that the program does raises here, or outlives the call.

    Args:
        source: The text of the program.
        limits: What it may use.

    Raises:
        UserError: A barrier cannot be put up on this machine; it says which and why.
    """
    if PLATFORM not in ("linux", "darwin"):
        raise UserError("Generated programs are run on Linux and macOS alone; use WSL on Windows.")
    token = secrets.token_hex(16)
    with (
        tempfile.TemporaryDirectory(prefix="program-", ignore_cleanup_errors=True) as folder,
        tempfile.TemporaryFile() as job,
    ):
        job.write(f"{token}\n{source}".encode("utf-8", "surrogatepass"))
        job.seek(0)
        results, results_end = os.pipe()
        try:
            process = subprocess.Popen(
                _command(results_end, limits),
                stdin=job,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                cwd=folder,
                env=_environment(folder),
                pass_fds=(results_end,),
                start_new_session=True,
            )
        except BaseException:
            os.close(results)
            raise
        finally:
            os.close(results_end)
        try:
            with contextlib.closing(_Pipes(process, results)) as pipes:
                reason = _watch(process, pipes, folder, limits)
        finally:
            _kill(process)
            os.close(results)
    return Outcome(True, "passed") if reason == token else Outcome(False, reason)


def run_programs(
    sources: Iterable[str], limits: Limits = _DEFAULT, workers: int | None = None
) -> Iterator[Outcome]:
    """Run programs side by side.

    Args:
        sources: The programs.
        limits: What each may use.
        workers: How many run at a time; None is one for each processor.

    Yields:
        Their outcomes, in their order.

    Raises:
        UserError: As `run_program`.
    """
    if workers is None:
        linux = hasattr(os, "sched_getaffinity")
        workers = len(os.sched_getaffinity(0)) if linux else os.cpu_count()
    with ThreadPoolExecutor(workers) as pool:
        yield from pool.map(functools.partial(run_program, limits=limits), sources)


def extract_code(output: str) -> str:
    """Take the solution out of a generation.

    That is the first fenced block marked as Python, else the first that bears no mark, else all of
    it; a block that was never closed goes to the end. It is cut before the first line that begins
    with ``if __name__``, ``# Example usage`` or ``assert``: indented ones belong to a function.
    """
    blocks = [(RANK.get(mark.strip().lower(), 2), text) for mark, text in FENCED.findall(output)]
    rank, code = min(blocks, key=lambda block: block[0], default=(2, output))
    code = code if rank < 2 else output
    cut = AFTER_SOLUTION.search(code)
    return code[: cut.start()] if cut else code


def _command(results: int, limits: Limits) -> list[str]:
    """Write the child's command line; its text goes by ``-c``, so that no folder is on its path."""
    return [
        sys.executable,
        "-c",
        CHILD.read_text(encoding="utf-8"),
        str(results),
        str(math.ceil(limits.seconds) + 1),
        str(limits.memory_bytes),
        str(limits.file_bytes),
        " ".join(LAYERS),
        *_readable(),
    ]


def _environment(folder: str) -> dict[str, str]:
    environment = {
        "HOME": folder,
        "TMPDIR": folder,
        "PATH": os.defpath,
        "LANG": "C.UTF-8",
        "MALLOC_ARENA_MAX": "1",  # Each would take 64 MiB of the address space.
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONHASHSEED": "0",  # Some solutions pass or fail by the order of a set.
        "PYTHONNOUSERSITE": "1",
        "PYTHONUTF8": "1",
    }
    libraries = os.environ.get("LD_LIBRARY_PATH")  # without which some interpreters do not start
    return environment | ({"LD_LIBRARY_PATH": libraries} if libraries else {})


def _readable() -> list[str]:
    """List what an interpreter has to read, and make sure that the home folder is not in it."""
    folders = {sys.prefix, sys.base_prefix, sys.exec_prefix, sys.base_exec_prefix}
    folders |= set(filter(None, os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep)))
    home = os.path.realpath(os.path.expanduser("~"))
    for folder in map(os.path.realpath, folders):
        if os.path.join(home, "").startswith(os.path.join(folder, "")):
            raise UserError(
                f"A generated program has to read {folder}, where the interpreter or its libraries "
                f"lie, and the home folder {home} is in it; use an interpreter in another folder."
            )
    return [*sorted(folders), *SYSTEM_FILES]


class _Pipes:
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


def _watch(process: subprocess.Popen[bytes], pipes: _Pipes, folder: str, limits: Limits) -> str:
    """Wait for the token or for the reason of a failure, whatever the program does meanwhile."""
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
        excess = _excess(process.pid, folder, pipes.written, limits)
        verdict = excess or pipes.line(1)
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


def _kill(process: subprocess.Popen[bytes]) -> None:
    # The group matters only where no seccomp forbids further processes.
    if process.returncode is None or "seccomp" not in LAYERS:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


def _excess(pid: int, folder: str, output_bytes: int, limits: Limits) -> str | None:
    """Say which limit is exceeded of those that the kernel does not keep."""
    if output_bytes > limits.output_bytes:
        return f"more than {limits.output_bytes} bytes of output"
    sizes = []
    with os.scandir(folder) as entries:
        for entry in entries:
            try:
                sizes.append(entry.stat(follow_symlinks=False).st_blocks * 512)
            except FileNotFoundError:
                continue
    if len(sizes) > limits.files:
        return f"more than {limits.files} files"
    if sum(sizes) > limits.file_bytes:
        return f"more than {limits.file_bytes} bytes in files"
    try:
        threads = len(os.listdir(f"/proc/{pid}/task"))
    except OSError:  # it has ended, or this is no Linux
        threads = 1
    return f"more than {limits.threads} threads" if threads > limits.threads else None
