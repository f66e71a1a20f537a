from __future__ import annotations

import ast
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from lightning_peft.datamodules.code import execution, sandbox_child
from lightning_peft.datamodules.code.execution import Outcome, run_program
from lightning_peft.datamodules.code.limits import Limits

GOOD = Outcome(True, "passed")
linux = pytest.mark.skipif(sys.platform != "linux", reason="the kernel's layers are Linux's")
# A kernel without Landlock is warned of, and everything here holds there as well.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Generated programs are held by:UserWarning"),
    pytest.mark.usefixtures("leaves_nothing_behind"),
]


@linux
def test_limits_cannot_be_raised_again(reason: Any) -> None:
    source = "import resource\nresource.setrlimit(resource.RLIMIT_{}, (-1, -1))"
    for name in ("AS", "CPU", "FSIZE", "NOFILE"):
        assert reason(source.format(name)) == "ValueError: not allowed to raise maximum limit"


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
def test_a_program_has_no_further_processes(
    source: str, layers: tuple[str, ...], reason: Any
) -> None:
    assert reason(source).startswith(
        ("PermissionError", "AssertionError", "OSError: out of pty devices")
    )


@linux
@pytest.mark.usefixtures("cannot_fork")
@pytest.mark.parametrize("call", ["fork()", "vfork()", "syscall(57)", "syscall(435, 0, 0)"])
def test_native_code_cannot_fork_either(call: str, reason: Any) -> None:
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
def test_a_program_has_no_network(source: str, layers: tuple[str, ...], reason: Any) -> None:
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
def test_a_datagram_socket_cannot_be_had_from_a_pair(long: Limits, reason: Any) -> None:
    pair = "import socket\nsocket.socketpair(socket.AF_UNIX, socket.SOCK_{})"
    assert run_program(pair.format("STREAM"), long) == GOOD
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
    source: str,
    layers: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    reason: Any,
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
    source: str, layers: tuple[str, ...], tmp_path: Path, reason: Any
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
def test_the_caller_cannot_be_harmed(source: str, layers: tuple[str, ...], reason: Any) -> None:
    if "seccomp" not in layers and ("setpriority" in source or "pidfd" in source):
        pytest.skip("Python raises no audit event of it")
    allowed = ("PermissionError", "OSError: [Errno 38]", "AttributeError")
    assert reason(source).startswith(allowed)


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


def test_the_child_stands_alone() -> None:
    """It is a script: it imports the standard library alone, which its folder must not hide."""
    assert Path(sandbox_child.__file__) == execution.CHILD
    imported = set()
    for node in ast.walk(ast.parse(execution.CHILD.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            imported.add(str(node.module).split(".")[0])
        elif isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
    assert imported <= sys.stdlib_module_names
    beside = {path.stem for path in execution.CHILD.parent.iterdir()}
    assert beside.isdisjoint(sys.stdlib_module_names)
