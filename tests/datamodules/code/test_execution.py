from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from lightning_peft.datamodules.code import execution
from lightning_peft.datamodules.code.execution import Outcome, run_program, run_programs
from lightning_peft.datamodules.code.limits import Limits

GOOD = Outcome(True, "passed")
SOLUTION = "def add(a, b):\n    return a + b\n"
linux = pytest.mark.skipif(sys.platform != "linux", reason="the kernel's layers are Linux's")
# A kernel without Landlock is warned of, and everything here holds there as well.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Generated programs are held by:UserWarning"),
    pytest.mark.usefixtures("leaves_nothing_behind"),
]


@pytest.mark.parametrize(
    "source",
    [
        SOLUTION + "assert add(1, 2) == 3",
        "",
        "print('ä', flush=True)\nimport sys\nprint('b', file=sys.stderr)",
        "if __name__ != '__main__': raise ValueError",
        "import dataclasses, pickle\n@dataclasses.dataclass\nclass A:\n    x: int = 1\n"
        "assert pickle.loads(pickle.dumps(A())) == A()\nassert A.__annotations__ == {'x': int}",
        "import threading\nt = threading.Thread(target=print)\nt.start()\nt.join()",
        "import asyncio\nassert asyncio.run(asyncio.sleep(0, 3)) == 3",
        "import tempfile\nwith tempfile.NamedTemporaryFile() as f: f.write(b'x')",
        "open('a', 'w').write('b')\nassert open('a').read() == 'b'\nimport os\nos.remove('a')",
        "import sqlite3, zoneinfo, ssl, decimal, hashlib, random\nsqlite3.connect(':memory:')",
        "import numpy as np\nassert (np.eye(2) @ np.eye(2)).sum() == 2",
        "import signal\nsignal.signal(signal.SIGUSR1, signal.SIG_IGN)\n"
        "import os\nassert os.listdir('.') == [] == os.listdir(os.path.expanduser('~'))",
        "import sys\nassert sys.argv == ['<program>'] and sys.flags.hash_randomization == 0",
        "import os\nassert not [name for name in os.environ if 'SECRET' in name]",
    ],
)
def test_a_good_program_passes(
    source: str, layers: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, long: Limits
) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "hf_x")
    assert run_program(source, Limits(memory_bytes=long.memory_bytes)) == GOOD


@linux
def test_a_program_dies_with_its_caller(long: Limits, children: Any) -> None:
    call = "from lightning_peft.datamodules.code import execution\n"
    call += f"limits = execution.Limits(seconds=60, memory_bytes={long.memory_bytes})\n"
    call += "execution.run_program('import time\\ntime.sleep(60)', limits)"
    left = Path(tempfile.gettempdir())
    caller = subprocess.Popen([sys.executable, "-c", call], env={**os.environ, "TMPDIR": str(left)})
    assert _soon(lambda: len(children()) == 1)
    caller.send_signal(signal.SIGKILL)
    caller.wait()
    assert _soon(lambda: children() == [])
    for folder in left.iterdir():  # for which there is nobody left
        folder.rmdir()


def _soon(condition: object) -> bool:
    assert callable(condition)
    end = time.monotonic() + 120  # the package is slow to import
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return bool(condition())


def test_outcomes_come_in_order(short: Limits) -> None:
    sources = [f"import time\ntime.sleep({0.3 if i == 0 else 0})\nassert {i} % 3" for i in range(9)]
    outcomes = list(run_programs(iter(sources), short, workers=4))
    assert [outcome.passed for outcome in outcomes] == [i % 3 > 0 for i in range(9)]
    assert outcomes[3].reason == "AssertionError: assert 3 % 3"


@pytest.mark.usefixtures("cannot_fork")
def test_good_programs_pass_among_bad_ones(short: Limits) -> None:
    bad = [
        "import os\nwhile True: os.fork()",
        "x = []\nwhile True: x.append('a' * 9999)",
        "import os\nos.kill(os.getppid(), 9)",
        "while True: print('a' * 9999)",
        "f = open('a', 'wb')\nwhile True: f.write(bytes(1 << 20))",
        "import os\nos.closerange(0, 1000)",
        "while True: pass",
    ]
    good = SOLUTION + "assert add(1, 2) == 3"
    sources = [source for one in bad for source in (one, good)] * 2
    passed = [outcome.passed for outcome in run_programs(sources, short, workers=3)]
    assert passed == [False, True] * 14


def test_programs_run_side_by_side(short: Limits) -> None:
    start = time.monotonic()
    outcomes = list(run_programs(["import time\ntime.sleep(1)"] * 4, short, workers=4))
    assert outcomes == [GOOD] * 4
    assert time.monotonic() - start < 3.5


def test_one_who_stops_listening_waits_for_those_that_run(short: Limits) -> None:
    outcomes = run_programs(["pass"] * 3 + ["import time\ntime.sleep(9)"] * 40, short, workers=2)
    assert next(outcomes) == GOOD
    start = time.monotonic()
    outcomes.close()  # type: ignore[attr-defined]
    assert time.monotonic() - start < 5


def test_windows_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(execution, "PLATFORM", "nt")
        with pytest.raises(ValueError, match="run on Linux and macOS alone"):
            run_program("pass")


def test_what_cannot_be_put_up_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, short: Limits
) -> None:
    monkeypatch.setenv("HOME", str(Path(sys.prefix) / "home"))
    with pytest.raises(ValueError, match="the home folder .* is in it"):
        run_program("pass", short)
    monkeypatch.undo()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    child = tmp_path / "child.py"
    text = execution.CHILD.read_text()
    child.write_text(text.replace('"x86_64": (', '"vax": (').replace('"aarch64": (', '"pdp": ('))
    monkeypatch.setattr(execution, "CHILD", child)
    if sys.platform == "linux":
        with pytest.raises(ValueError, match="its call numbers are known for vax and pdp, not"):
            run_program("pass", short)
    child.write_text("raise SystemExit('no such thing')")
    with pytest.raises(ValueError, match="on this machine: no such thing"):
        run_program("pass", short)


def _records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_humaneval_solutions_pass(long: Limits, real: Any) -> None:
    sources = [
        f"{r['prompt']}{r['canonical_solution']}\n{r['test']}\ncheck({r['entry_point']})"
        for r in _records(real("code/humaneval/HumanEval.jsonl"))
    ]
    assert list(run_programs(sources, long)) == [GOOD] * 164


def _mbpp(path: Path, step: int) -> list[int]:
    """The tasks whose own solutions fail."""
    records = _records(path)[::step]
    sources = ["\n".join((r["test_setup_code"], r["code"], *r["test_list"])) for r in records]
    outcomes = run_programs(sources, Limits(seconds=20, memory_bytes=1 << 30))
    return [r["task_id"] for r, o in zip(records, outcomes, strict=True) if not o.passed]


def test_a_tenth_of_mbpp_solutions_passes(real: Any) -> None:
    assert set(_mbpp(real("code/mbpp/mbpp.jsonl"), 10)) <= {123, 367, 927}


@pytest.mark.long  # test_module.py has them pass as a test's answers
def test_mbpp_solutions_pass(real: Any) -> None:
    assert set(_mbpp(real("code/mbpp/mbpp.jsonl"), 1)) <= {123, 367, 927}
