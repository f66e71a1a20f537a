from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lightning_peft.datamodules.code import execution, sandbox_child
from lightning_peft.datamodules.code.execution import (
    Limits,
    Outcome,
    extract_code,
    run_program,
    run_programs,
)

REAL = Path(__file__).parents[3].parent / "shared" / "data" / "code"
# A number that no other process on the machine bears in its command line.
MEMORY = (256 << 20) + 4096 * (os.getpid() % 4096)
SHORT = Limits(seconds=1.5, memory_bytes=MEMORY)
# For programs that another limit stops, however busy the machine is.
LONG = Limits(seconds=30, memory_bytes=MEMORY)
GOOD = Outcome(True, "passed")
SOLUTION = "def add(a, b):\n    return a + b\n"
linux = pytest.mark.skipif(sys.platform != "linux", reason="the kernel's layers are Linux's")
# A kernel without Landlock is warned of, and everything here holds there as well.
pytestmark = pytest.mark.filterwarnings("ignore:Generated programs are held by:UserWarning")


def children() -> list[int]:
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


@pytest.fixture(autouse=True)
def _leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """After each test no process is left, no file and no thread."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    threads = threading.active_count()
    yield
    assert children() == []
    assert list(folder.iterdir()) == []
    assert threading.active_count() == threads


@pytest.fixture(scope="module")
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


def reason(source: str, limits: Limits = LONG) -> str:
    outcome = run_program(source, limits)
    assert not outcome.passed
    return outcome.reason


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
    source: str, layers: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "hf_x")
    assert run_program(source, Limits(memory_bytes=MEMORY)) == GOOD


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
def test_a_failing_program_says_why(source: str, expected: str | None) -> None:
    times_out = expected is not None and expected.startswith("timed out")
    said = reason(source, SHORT if times_out else LONG)
    assert said == expected or expected is None


def test_a_program_with_many_threads_has_no_more_processor_time() -> None:
    spin = """
        import hashlib, threading
        data = bytes(1 << 20)
        def work():
            while True: hashlib.sha256(data)
        for _ in range(8): threading.Thread(target=work).start()
        while True: pass
    """
    assert reason(textwrap.dedent(spin), SHORT).startswith("timed out after 1.5 s")


@linux
@pytest.mark.parametrize(
    "source", ["x = 'a' * (1 << 32)", "x = []\nwhile True: x.append('a' * 9999)"]
)
def test_memory_is_limited(source: str) -> None:
    assert reason(source) == "memory"


@linux
def test_limits_cannot_be_raised_again() -> None:
    source = "import resource\nresource.setrlimit(resource.RLIMIT_{}, (-1, -1))"
    for name in ("AS", "CPU", "FSIZE", "NOFILE"):
        assert reason(source.format(name)) == "ValueError: not allowed to raise maximum limit"


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
def test_files_and_output_are_limited(source: str, expected: str, layers: tuple[str, ...]) -> None:
    assert reason(source).startswith(expected)


@linux
def test_threads_are_limited() -> None:
    source = "import threading, time\nthreading.stack_size(32768)\n"
    source += "while True: threading.Thread(target=time.sleep, args=(9,)).start()"
    assert reason(source) == "more than 32 threads"


@pytest.mark.usefixtures("cannot_fork")
@pytest.mark.parametrize(
    "source",
    [
        "import os\nwhile True: os.fork()",
        "import os\nfor _ in range(10**5):\n    try: os.fork()\n    except OSError: pass\nassert 0",
        "import os\nif os.fork(): os._exit(0)\nos.setsid()\nif os.fork(): os._exit(0)\n"
        "while True: pass",
        "import subprocess\nsubprocess.run(['sh', '-c', 'sleep 60 &'], check=True)",
        "import multiprocessing\nmultiprocessing.Pool(2).map(str, [1])",
        "import os\nassert os.system('true') == 0",
        "import os\nos.posix_spawn('/bin/sh', ['sh', '-c', 'true'], {})",
        "import os\nos.execv('/bin/sh', ['sh', '-c', 'true'])",
        "import pty\npty.spawn('sh')",
    ],
)
def test_a_program_has_no_further_processes(source: str, layers: tuple[str, ...]) -> None:
    assert reason(source).startswith(
        ("PermissionError", "AssertionError", "OSError: out of pty devices")
    )


@linux
@pytest.mark.usefixtures("cannot_fork")
@pytest.mark.parametrize("call", ["fork()", "vfork()", "syscall(57)", "syscall(435, 0, 0)"])
def test_native_code_cannot_fork_either(call: str) -> None:
    source = f"import ctypes\nassert ctypes.CDLL(None).{call} >= 0"
    assert reason(source).startswith(("AssertionError", "PermissionError"))


@pytest.mark.parametrize(
    "source",
    [
        "import socket\nsocket.create_connection(('127.0.0.1', PORT), 1).send(b'x')",
        "import socket\ns = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
        "s.sendto(b'x', ('127.0.0.1', PORT))",
        "import urllib.request\nurllib.request.urlopen('http://127.0.0.1:PORT', timeout=1)",
        "import subprocess\nsubprocess.run(['curl', '-m1', 'http://127.0.0.1:PORT'], check=True)",
        "import os\nassert os.system('exec 3<>/dev/tcp/127.0.0.1/PORT') == 0",
    ],
)
def test_a_program_has_no_network(source: str, layers: tuple[str, ...]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0)
        port = server.getsockname()[1]
        reason(source.replace("PORT", str(port)))
        with pytest.raises(BlockingIOError):
            server.accept()
        # The server is one that would have seen it.
        with socket.create_connection(("127.0.0.1", port), 1):
            server.settimeout(1)
            server.accept()[0].close()


@linux
def test_a_datagram_socket_cannot_be_had_from_a_pair() -> None:
    pair = "import socket\nsocket.socketpair(socket.AF_UNIX, socket.SOCK_{})"
    assert run_program(pair.format("STREAM"), LONG) == GOOD
    assert reason(pair.format("DGRAM")).startswith("PermissionError")


@pytest.mark.parametrize(
    "source",
    [
        "print(open(SECRET).read())",
        "import pathlib\npathlib.Path(SECRET).read_text()",
        "import os\nos.read(os.open(SECRET, os.O_RDONLY), 9)",
        "import os\nos.listdir(os.path.dirname(SECRET))",
        "import os\nos.chdir(os.path.dirname(SECRET))\nopen('secret').read()",
        "import os\nopen(os.path.relpath(SECRET)).read()",
        "import os\nopen(os.path.expanduser('~/secret')).read()",
        "import mmap, os\nmmap.mmap(os.open(SECRET, os.O_RDWR), 0)",
        "import sqlite3\nsqlite3.connect(SECRET).execute('create table a(b)')",
        "import sqlite3\nsqlite3.connect(f'file:{SECRET}', uri=True).execute('create table a(b)')",
        "import os, shutil\nshutil.copy(SECRET, 'copy')",
        "import os\nos.link(SECRET, 'link')\nopen('link').read()",
        "import pwd, os\nos.listdir(pwd.getpwuid(os.getuid()).pw_dir)",
        "open(f'/proc/{__import__(\"os\").getppid()}/environ', 'rb').read()",
        "open('/proc/self/mem', 'r+b')",
        "open('/etc/passwd').read()",
        "import os\nos.listdir('/tmp')",
        "import os\nos.listdir('/')",
    ],
)
def test_a_program_cannot_read_outside(
    source: str, layers: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    secret = home / "secret"
    secret.write_text("secret")
    monkeypatch.setenv("HOME", str(home))
    assert (Path.home() / "secret").read_text() == "secret"
    said = reason(f"SECRET = {str(secret)!r}\n{source}")
    assert "Error" in said
    assert not said.startswith(("AssertionError", "NameError", "SyntaxError", "AttributeError"))
    assert secret.read_text() == "secret"


@pytest.mark.parametrize(
    "source",
    [
        "open(SECRET + '2', 'w')",
        "open(SECRET, 'a')",
        "open(SECRET, 'r+')",
        "import os\nos.open(SECRET, os.O_RDONLY | os.O_TRUNC)",
        "import os\nos.truncate(SECRET, 0)",
        "import os\nos.remove(SECRET)",
        "import os\nos.rename(SECRET, 'here')",
        "import os\nopen('here', 'w').close()\nos.rename('here', SECRET)",
        "import os\nos.chmod(SECRET, 0)",
        "import os\nos.utime(SECRET, (0, 0))",
        "import os\nos.mkdir(SECRET + '2')",
        "import os\nos.rmdir(os.path.dirname(SECRET) + '/empty')",
        "import os\nos.setxattr(SECRET, 'user.a', b'b')",
        "import os\nopen(os.__file__, 'a')",
        "import os, sys\nopen(os.path.join(sys.prefix, 'new'), 'w')",
    ],
)
def test_a_program_cannot_write_outside(
    source: str, layers: tuple[str, ...], tmp_path: Path
) -> None:
    (tmp_path / "outside" / "empty").mkdir(parents=True)
    secret = tmp_path / "outside" / "secret"
    secret.write_text("secret")
    before = secret.stat()
    assert reason(f"SECRET = {str(secret)!r}\n{source}").startswith(
        ("PermissionError", "OSError: [Errno 18]", "AttributeError")
    )
    assert sorted(p.name for p in secret.parent.iterdir()) == ["empty", "secret"]
    assert secret.read_text() == "secret"
    after = secret.stat()
    assert (after.st_mode, after.st_mtime) == (before.st_mode, before.st_mtime)


@pytest.mark.parametrize(
    "source",
    [
        "import os\nos.kill(os.getppid(), 9)",
        "import os\nos.kill(-1, 9)",
        "import os\nos.killpg(os.getpgid(os.getppid()), 9)",
        "import os, resource\nresource.prlimit(os.getppid(), resource.RLIMIT_CPU, (1, 1))",
        "import fcntl, os\nfcntl.fcntl(os.pipe()[0], fcntl.F_SETOWN, os.getppid())",
        "import fcntl, os, struct\nimport socket\na, b = socket.socketpair()\n"
        "fcntl.ioctl(a, 0x8901, struct.pack('i', os.getppid()))",
        "import os\nos.setpriority(os.PRIO_PROCESS, os.getppid(), 19)",
        "import os\nos.close(os.pidfd_open(os.getppid()))",
    ],
)
def test_the_caller_cannot_be_harmed(source: str, layers: tuple[str, ...]) -> None:
    if "seccomp" not in layers and ("setpriority" in source or "pidfd" in source):
        pytest.skip("Python raises no audit event of it")
    allowed = ("PermissionError", "OSError: [Errno 38]", "AttributeError")
    assert reason(source).startswith(allowed)


def test_a_program_that_closes_everything_is_over() -> None:
    outcome = run_program("import os\nos.closerange(0, 1000)", SHORT)
    assert not outcome.passed
    source = "import os, time\nos.closerange(0, 1000)\ntime.sleep(60)"
    assert reason(source, SHORT) == "timed out after 1.5 s"


def test_a_program_cannot_say_that_it_passed() -> None:
    source = "import os\nfor fd in range(3, 64):\n    try: os.write(fd, b'passed\\n')\n"
    assert not run_program(source + "    except OSError: pass\nassert False", SHORT).passed
    assert not run_program(source + "    except OSError: pass\nos._exit(0)", SHORT).passed


@linux
def test_a_program_dies_with_its_caller() -> None:
    # By its path: the package is slow to import, and its folder holds a math.py and a code.py.
    call = "import importlib.util, sys\n"
    call += f"spec = importlib.util.spec_from_file_location('it', {execution.__file__!r})\n"
    call += "execution = sys.modules['it'] = importlib.util.module_from_spec(spec)\n"
    call += "spec.loader.exec_module(execution)\n"
    call += f"limits = execution.Limits(seconds=60, memory_bytes={MEMORY})\n"
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
    end = time.monotonic() + 20
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return bool(condition())


def test_outcomes_come_in_order() -> None:
    sources = [f"import time\ntime.sleep({0.3 if i == 0 else 0})\nassert {i} % 3" for i in range(9)]
    outcomes = list(run_programs(iter(sources), SHORT, workers=4))
    assert [outcome.passed for outcome in outcomes] == [i % 3 > 0 for i in range(9)]
    assert outcomes[3].reason == "AssertionError: assert 3 % 3"


@pytest.mark.usefixtures("cannot_fork")
def test_good_programs_pass_among_bad_ones() -> None:
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
    passed = [outcome.passed for outcome in run_programs(sources, SHORT, workers=3)]
    assert passed == [False, True] * 14


def test_programs_run_side_by_side() -> None:
    start = time.monotonic()
    outcomes = list(run_programs(["import time\ntime.sleep(1)"] * 4, SHORT, workers=4))
    assert outcomes == [GOOD] * 4
    assert time.monotonic() - start < 3.5


def test_one_who_stops_listening_waits_for_those_that_run() -> None:
    outcomes = run_programs(["pass"] * 3 + ["import time\ntime.sleep(9)"] * 40, SHORT, workers=2)
    assert next(outcomes) == GOOD
    start = time.monotonic()
    outcomes.close()  # type: ignore[attr-defined]
    assert time.monotonic() - start < 5


def test_wrong_limits_are_refused() -> None:
    with pytest.raises(ValueError, match="seconds is 0; it has to be more than 0"):
        Limits(seconds=0)


def test_windows_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(execution, "PLATFORM", "nt")
        with pytest.raises(ValueError, match="run on Linux and macOS alone"):
            run_program("pass")


def test_what_cannot_be_put_up_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(Path(sys.prefix) / "home"))
    with pytest.raises(ValueError, match="the home folder .* is in it"):
        run_program("pass", SHORT)
    monkeypatch.undo()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    child = tmp_path / "child.py"
    text = execution.CHILD.read_text()
    child.write_text(text.replace('"x86_64": (', '"vax": (').replace('"aarch64": (', '"pdp": ('))
    monkeypatch.setattr(execution, "CHILD", child)
    if sys.platform == "linux":
        with pytest.raises(ValueError, match="its call numbers are known for vax and pdp, not"):
            run_program("pass", SHORT)
    child.write_text("raise SystemExit('no such thing')")
    with pytest.raises(ValueError, match="on this machine: no such thing"):
        run_program("pass", SHORT)


@pytest.mark.filterwarnings("default:Generated programs are held by:UserWarning")
def test_weaker_protection_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execution, "LAYERS", ())
    with pytest.warns(UserWarning, match="held by limits, audit alone"):
        assert run_program("pass", LONG) == GOOD


HEADERS = (
    ("x86_64", "/usr/include/x86_64-linux-gnu/asm/unistd_64.h"),
    ("aarch64", "/usr/include/asm-generic/unistd.h"),
)


@pytest.mark.parametrize(("machine", "header"), HEADERS)
def test_numbers_of_calls_are_the_kernels(machine: str, header: str) -> None:
    if not Path(header).is_file():
        pytest.skip(f"no {header}")
    kernel = {}
    for line in Path(header).read_text().splitlines():
        words = line.split()
        if words[:1] == ["#define"] and len(words) == 3 and words[2].isdigit():
            kernel[words[1].removeprefix("__NR_").removeprefix("__NR3264_")] = int(words[2])
    place, _ = sandbox_child.MACHINES[machine]
    words = sandbox_child.REFUSED.split()
    assert len(words) % 3 == 0
    named = dict(zip(words[::3], words[1 + place :: 3], strict=True))
    assert {name: kernel.get(name, "-") for name in named} == {
        name: "-" if number == "-" else int(number) for name, number in named.items()
    }
    conditional = ("clone", "socketpair", "kill", "tgkill", "prlimit64", "fcntl", "ioctl")
    assert [kernel[name] for name in conditional] == [
        numbers[place] for numbers, *_ in sandbox_child.CONDITIONS
    ]
    assert kernel["pidfd_send_signal"] == sandbox_child.FIRST_NEW_CALL


@pytest.mark.parametrize(
    ("output", "code"),
    [
        ("    return 1\n", "    return 1\n"),
        ("Here:\n```python\ndef f():\n    pass\n```\nDone.", "def f():\n    pass\n"),
        ("```Python\nx = 1\n```\n```python\ny = 2\n```", "x = 1\n"),
        ("```bash\npip install a\n```\n```\nx = 1\n```\n```py\ny = 2\n```", "y = 2\n"),
        ("```bash\npip install a\n```\n```\nx = 1\n```", "x = 1\n"),
        ("x = '''\n```json\n{}\n```\n'''", "x = '''\n```json\n{}\n```\n'''"),
        ("```python\nx = 1\ny = ", "x = 1\ny = "),
        ("x = 1\nif __name__ == '__main__':\n    f()\n", "x = 1\n"),
        ("x = 1\n# Example usage:\nprint(x)", "x = 1\n"),
        ("x = 1\nassert x == 1\ny = 2", "x = 1\n"),
        ("x = 1\nassert(x == 1)", "x = 1\n"),
        ("x = 1\nassertion = 2\n", "x = 1\nassertion = 2\n"),
        ("def f(x):\n    assert x\n    return x\n", "def f(x):\n    assert x\n    return x\n"),
        ("```python\nx = 1\n\n# Example usage\nf()\n```\nassert 1", "x = 1\n\n"),
        ("", ""),
    ],
)
def test_code_is_taken_out_of_a_generation(output: str, code: str) -> None:
    assert extract_code(output) == code


def _records(name: str) -> list[dict]:
    return [json.loads(line) for line in (REAL / name).read_text().splitlines()]


@pytest.mark.skipif(not REAL.is_dir(), reason="no ../shared/data/code")
def test_humaneval_solutions_pass() -> None:
    sources = [
        f"{r['prompt']}{r['canonical_solution']}\n{r['test']}\ncheck({r['entry_point']})"
        for r in _records("humaneval/HumanEval.jsonl")
    ]
    assert list(run_programs(sources, Limits(seconds=30, memory_bytes=MEMORY))) == [GOOD] * 164


def _mbpp(step: int) -> list[int]:
    """The tasks whose own solutions fail."""
    records = _records("mbpp/mbpp.jsonl")[::step]
    sources = ["\n".join((r["test_setup_code"], r["code"], *r["test_list"])) for r in records]
    outcomes = run_programs(sources, Limits(seconds=20, memory_bytes=1 << 30))
    return [r["task_id"] for r, o in zip(records, outcomes, strict=True) if not o.passed]


@pytest.mark.skipif(not REAL.is_dir(), reason="no ../shared/data/code")
def test_a_tenth_of_mbpp_solutions_passes() -> None:
    assert set(_mbpp(10)) <= {123, 367, 927}


@pytest.mark.slow
@pytest.mark.skipif(not REAL.is_dir(), reason="no ../shared/data/code")
def test_mbpp_solutions_pass() -> None:
    assert set(_mbpp(1)) <= {123, 367, 927}
