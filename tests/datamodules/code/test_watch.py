from __future__ import annotations

import textwrap
from typing import Any

import pytest

from lightning_peft.datamodules.code import execution
from lightning_peft.datamodules.code.execution import Outcome, run_program
from lightning_peft.datamodules.code.limits import Limits

GOOD = Outcome(True, "passed")
SOLUTION = "def add(a, b):\n    return a + b\n"
# A kernel without Landlock is warned of, and everything here holds there as well.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Generated programs are held by:UserWarning"),
    pytest.mark.usefixtures("leaves_nothing_behind"),
]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (SOLUTION + "\nassert add(1, 2) == 4", "AssertionError: assert add(1, 2) == 4"),
        (SOLUTION + "assert add(1, 2) == 4, 'one\\ntwo'", "AssertionError: one two"),
        ("def f(:", "SyntaxError: invalid syntax (<program>, line 1)"),
        ("f()", "NameError: name 'f' is not defined"),
        ("input()", "EOFError: EOF when reading a line"),
        ("\0", None),
        ("\ud800", None),
        ("class E(BaseException):\n    def __str__(self): raise self\nraise E", "E"),
        ("raise ValueError('x' * 10**6)", "ValueError: " + "x" * 288),
        ("def f(): f()\nf()", "RecursionError: maximum recursion depth exceeded"),
        ("import sys\nsys.exit(0)\nassert False", "SystemExit: 0"),
        ("import os\nos._exit(0)\nassert False", "exited with code 0 before its end"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("import os\nos.abort()", "killed by SIGABRT"),
        ("import signal\nsignal.raise_signal(9)", "killed by SIGKILL"),
        ("import signal\nsignal.raise_signal(40)", "killed by signal 40"),
        ("while True: pass", "timed out after 1.5 s"),
        ("import time\ntime.sleep(60)", "timed out after 1.5 s"),
        ("while True:\n  try: print(1 / 0)\n  except BaseException: pass", "timed out after 1.5 s"),
        ("import signal\nsignal.raise_signal(signal.SIGSTOP)", "timed out after 1.5 s"),
    ],
)
def test_a_failing_program_says_why(
    source: str, expected: str | None, short: Limits, long: Limits, reason: Any
) -> None:
    times_out = expected is not None and expected.startswith("timed out")
    said = reason(source, short if times_out else long)
    assert said == expected or expected is None


def test_a_program_with_many_threads_has_no_more_processor_time(short: Limits, reason: Any) -> None:
    spin = """
        import hashlib, threading
        data = bytes(1 << 20)
        def work():
            while True: hashlib.sha256(data)
        for _ in range(8): threading.Thread(target=work).start()
        while True: pass
    """
    assert reason(textwrap.dedent(spin), short).startswith("timed out after 1.5 s")


def test_a_program_that_closes_everything_is_over(short: Limits, reason: Any) -> None:
    outcome = run_program("import os\nos.closerange(0, 1000)", short)
    assert not outcome.passed
    source = "import os, time\nos.closerange(0, 1000)\ntime.sleep(60)"
    assert reason(source, short) == "timed out after 1.5 s"


def test_a_program_cannot_say_that_it_passed(short: Limits) -> None:
    source = "import os\nfor fd in range(3, 64):\n    try: os.write(fd, b'passed\\n')\n"
    assert not run_program(source + "    except OSError: pass\nassert False", short).passed
    assert not run_program(source + "    except OSError: pass\nos._exit(0)", short).passed


@pytest.mark.filterwarnings("default:Generated programs are held by:UserWarning")
def test_weaker_protection_is_said(monkeypatch: pytest.MonkeyPatch, long: Limits) -> None:
    monkeypatch.setattr(execution, "LAYERS", ())
    with pytest.warns(UserWarning, match="held by limits, audit alone"):
        assert run_program("pass", long) == GOOD
