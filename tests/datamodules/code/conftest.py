"""The sandbox as its tests use it: what a program may use there, and what it must not leave."""

from __future__ import annotations

import os
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lightning_peft.datamodules.code import execution
from lightning_peft.datamodules.code.execution import run_program
from lightning_peft.datamodules.code.limits import Limits

# A number that no other process on the machine bears in its command line.
MEMORY = (256 << 20) + 4096 * (os.getpid() % 4096)
SHORT = Limits(seconds=1.5, memory_bytes=MEMORY)
# For programs that another limit stops, however busy the machine is.
LONG = Limits(seconds=30, memory_bytes=MEMORY)
linux = pytest.mark.skipif(sys.platform != "linux", reason="the kernel's layers are Linux's")


def running() -> list[int]:
    """The processes on this machine that run a program of these tests."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            arguments = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if str(MEMORY).encode() in arguments:
            found.append(int(folder.name))
    return found


@pytest.fixture
def children() -> Callable[[], list[int]]:
    return running


@pytest.fixture(scope="session")
def short() -> Limits:
    return SHORT


@pytest.fixture(scope="session")
def long() -> Limits:
    return LONG


@pytest.fixture
def leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """After the test no process is left, no file and no thread."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    threads = threading.active_count()
    yield
    assert running() == []
    assert list(folder.iterdir()) == []
    assert threading.active_count() == threads


@pytest.fixture(scope="session")
def cannot_fork() -> None:
    """Stop before any bomb where a single fork is not refused."""
    outcome = run_program("import os\nif os.fork() == 0: os._exit(0)", SHORT)
    if not outcome.reason.startswith("PermissionError"):
        pytest.exit(f"a program may fork: {outcome}")


@pytest.fixture(
    params=[
        pytest.param(None, id="as_here"),
        pytest.param(("seccomp",), id="without_landlock", marks=linux),
        pytest.param((), id="audit_alone"),
    ]
)
def layers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    """The layers of this machine, and those of lesser ones."""
    if request.param is not None:
        monkeypatch.setattr(execution, "LAYERS", request.param)
    return execution.LAYERS


@pytest.fixture(scope="session")
def reason() -> Callable[..., str]:
    """Why a program fails, which it has to."""

    def why(source: str, limits: Limits = LONG) -> str:
        outcome = run_program(source, limits)
        assert not outcome.passed
        return outcome.reason

    return why
