from __future__ import annotations

import sys
from typing import Any

import pytest

from lightning_peft.datamodules.code.limits import Limits

linux = pytest.mark.skipif(sys.platform != "linux", reason="the kernel's layers are Linux's")
# A kernel without Landlock is warned of, and everything here holds there as well.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Generated programs are held by:UserWarning"),
    pytest.mark.usefixtures("leaves_nothing_behind"),
]


@linux
@pytest.mark.parametrize(
    "source", ["x = 'a' * (1 << 32)", "x = []\nwhile True: x.append('a' * 9999)"]
)
def test_memory_is_limited(source: str, reason: Any) -> None:
    assert reason(source) == "memory"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("f = open('a', 'wb')\nwhile True: f.write(bytes(1 << 20))", "OSError: [Errno 27] File"),
        ("i = 0\nwhile True:\n    i += 1\n    open(str(i), 'w').close()", "more than 64 files"),
        (
            "i = 0\nwhile True:\n    i += 1\n    open(str(i % 50), 'wb').write(bytes(1 << 20))",
            "more than 16777216 bytes in files",
        ),
        ("import os\nwhile True: os.mkdir('a')\nos.chdir('a')", "PermissionError"),
        ("import os\nos.symlink('/', 'a')", "PermissionError"),
        ("f = [open('a', 'w')]\nwhile True: f.append(open('a'))", "OSError: [Errno 24] Too many"),
        ("while True: print('a' * 9999)", "more than 1048576 bytes of output"),
        ("import os\nwhile True: os.write(2, bytes(9999))", "more than 1048576 bytes of output"),
        (
            "import os\nfor fd in range(3, 64):\n    try:\n"
            "        while True: os.write(fd, bytes(999))\n    except OSError: pass",
            "more than 1048576 bytes of output",
        ),
    ],
)
def test_files_and_output_are_limited(
    source: str, expected: str, layers: tuple[str, ...], reason: Any
) -> None:
    assert reason(source).startswith(expected)


@linux
def test_threads_are_limited(reason: Any) -> None:
    source = "import threading, time\nthreading.stack_size(32768)\n"
    source += "while True: threading.Thread(target=time.sleep, args=(9,)).start()"
    assert reason(source) == "more than 32 threads"


def test_wrong_limits_are_refused() -> None:
    with pytest.raises(ValueError, match="seconds is 0; it has to be more than 0"):
        Limits(seconds=0)
