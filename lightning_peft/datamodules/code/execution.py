"""Running what a model wrote, in a sandbox.

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
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from lightning_peft.datamodules.code.limits import Limits
from lightning_peft.datamodules.code.watch import Pipes, watch
from lightning_peft.errors import UserError

CHILD = Path(__file__).with_name("sandbox_child.py")
PLATFORM = sys.platform
# What is asked of the kernel; a test takes some away.
LAYERS = ("landlock", "seccomp") if PLATFORM == "linux" else ()
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
        _child(f"{token}\n{source}", folder, limits) as pipes,
    ):
        reason = watch(pipes, folder, limits)
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


@contextlib.contextmanager
def _child(job: str, folder: str, limits: Limits) -> Iterator[Pipes]:
    """Start a child with its job on stdin, and end it, whatever happens meanwhile."""
    with tempfile.TemporaryFile() as stdin:
        stdin.write(job.encode("utf-8", "surrogatepass"))
        stdin.seek(0)
        results, results_end = os.pipe()
        try:
            try:
                process = subprocess.Popen(
                    _command(results_end, limits),
                    stdin=stdin,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    cwd=folder,
                    env=_environment(folder),
                    pass_fds=(results_end,),
                    start_new_session=True,
                )
            finally:
                os.close(results_end)
            try:
                with contextlib.closing(Pipes(process, results)) as pipes:
                    yield pipes
            finally:
                _kill(process)
        finally:
            os.close(results)


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


def _kill(process: subprocess.Popen[bytes]) -> None:
    # The group matters only where no seccomp forbids further processes.
    if process.returncode is None or "seccomp" not in LAYERS:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert process.stdout is not None
    process.stdout.close()
