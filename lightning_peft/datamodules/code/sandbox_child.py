"""The child's side of `execution`: put up the barriers, then run the program that comes on stdin.

A script of its own and never imported: it starts in milliseconds, with nothing of the caller's in
memory, and imports nothing but the standard library. Its arguments are the file descriptor for
results, `seconds`, `memory_bytes`, `file_bytes`, the layers to use and the readable paths. stdin
holds the token in its first line and the program after it. It writes two lines to the results:
``ready <layers>`` or ``refused <sentence>``, then the token or the reason of a failure.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import struct
import sys
import types
from collections.abc import Callable, Iterable
from typing import Any

PROGRAM = "<program>"
OPEN_FILES = 64
SHOWN = 300  # characters of a reason

# What a program is refused by the kernel, as name, number on x86-64, number on arm64 (asm-generic).
REFUSED = """
fork 57 -           vfork 58 -            execve 59 221         execveat 322 281
socket 41 198       prctl 157 167         unshare 272 97        setns 308 268
tkill 200 130       rt_sigqueueinfo 129 138                     rt_tgsigqueueinfo 297 240
ptrace 101 117      process_vm_readv 310 270                    process_vm_writev 311 271
kcmp 312 272        setpriority 141 140   ioprio_set 251 30     sched_setaffinity 203 122
sched_setparam 142 118                    sched_setscheduler 144 119
sched_setattr 314 274                     migrate_pages 256 238
move_pages 279 239  perf_event_open 298 241
bpf 321 280         userfaultfd 323 282   syslog 103 116        open_by_handle_at 304 265
add_key 248 217     request_key 249 218   keyctl 250 219        memfd_create 319 279
shmget 29 194       msgget 68 186         semget 64 190         mq_open 240 180
mkdir 83 -          mkdirat 258 34        mknod 133 -           mknodat 259 33
link 86 -           linkat 265 37         symlink 88 -          symlinkat 266 36
chmod 90 -          fchmod 91 52          fchmodat 268 53       truncate 76 45
chown 92 -          fchown 93 55          lchown 94 -           fchownat 260 54
setxattr 188 5      lsetxattr 189 6       fsetxattr 190 7
removexattr 197 14  lremovexattr 198 15   fremovexattr 199 16
utime 132 -         utimes 235 -          futimesat 261 -       utimensat 280 88
"""
# Refused but for one use: numbers, the argument looked at, its bits, their value, and whether that
# value is the allowed use or the refused one. None stands for the process's own id.
CONDITIONS = (
    ((56, 220), 0, 0x10000, 0x10000, True),  # clone: CLONE_THREAD, so threads and no processes
    ((53, 199), 1, 0xF, 1, True),  # socketpair: SOCK_STREAM; a datagram's could send elsewhere
    ((62, 129), 0, 0xFFFFFFFF, None, True),  # kill: itself
    ((234, 131), 0, 0xFFFFFFFF, None, True),  # tgkill: itself, which is how abort() works
    ((302, 261), 0, 0xFFFFFFFF, 0, True),  # prlimit64: itself
    ((72, 25), 1, 0xFFFFFFF8, 8, False),  # fcntl: F_SETOWN, F_SETSIG, which signal others
    ((16, 29), 1, 0xFFFFFFFC, 0x8900, False),  # ioctl: FIOSETOWN, SIOCSPGRP, the same for sockets
)
# The calls from this number on are the same on every machine, new, and dispensable: the C library
# does without them, and io_uring, pidfds and mounts are among them.
FIRST_NEW_CALL = 424
# Machine: its place in REFUSED, and AUDIT_ARCH.
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}

# Landlock's rights: read a file, list a folder, write and cut a file, make and remove one.
READ_FILE, READ_DIR, WRITE_FILE, REMOVE_FILE, MAKE_REG, TRUNCATE = (
    1 << bit for bit in (2, 3, 1, 5, 8, 14)
)
RIGHTS_BY_VERSION = (0, 13, 14, 15, 15, 16)

# Before this version, truncating what may be read is not refused.
FIRST_WHOLE_LANDLOCK = 3

# Audit events that are refused where the kernel does not refuse what they announce.
FILE_EVENTS = ("ctypes.dlopen", "os.rmdir")
OTHER_EVENTS = ("fcntl.", "os.", "pty.", "resource.prlimit", "socket.", "subprocess.")
HARMLESS = {"os.chdir", "os.fwalk", "os.putenv", "os.unsetenv", "os.walk", "socket.__new__"}


class Refusal(Exception):
    """A barrier that cannot be put up here."""


def limit(seconds: int, memory_bytes: int, file_bytes: int, may_fork: bool) -> None:
    """Limit what the process may use, and its forking where seccomp does not."""
    limits = {"FSIZE": file_bytes, "NOFILE": OPEN_FILES, "CORE": 0}
    if sys.platform == "linux":
        limits["AS"] = memory_bytes  # macOS does not keep to it
    if may_fork:
        limits["NPROC"] = 0
    for name, value in limits.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))  # SIGXCPU, then SIGKILL


def give_up_privileges(libc: Any) -> None:
    """Die with the caller, leave no core, gain nothing by exec, and lose root's capabilities."""
    death_signal, dumpable, no_new_privileges = (1, signal.SIGKILL), (4, 0), (38, 1)
    for option, value in (death_signal, dumpable, no_new_privileges):
        checked(libc.prctl(option, value, 0, 0, 0), "prctl")
    header = struct.pack("=Ii", 0x20080522, 0)  # version 3, this process
    # Without them root may not raise its limits again, mount, or reach into other processes.
    checked(libc.capset(header, bytes(24)), "capset")


def landlock(libc: Any, folder: str, readable: Iterable[str]) -> int:
    """Let the process read some paths, and make, write and remove files in one folder.

    Returns:
        The version of Landlock in the kernel, 0 without it.
    """
    version = max(0, libc.syscall(444, None, 0, 1))
    if version == 0:
        return 0
    handled = (1 << RIGHTS_BY_VERSION[min(version, len(RIGHTS_BY_VERSION) - 1)]) - 1
    ruleset = libc.syscall(444, struct.pack("=Q", handled), 8, 0)
    checked(ruleset, "landlock_create_ruleset")
    rules = dict.fromkeys(readable, READ_FILE | READ_DIR)
    rules[folder] = READ_FILE | READ_DIR | WRITE_FILE | TRUNCATE | MAKE_REG | REMOVE_FILE
    rules["/dev/null"] = READ_FILE | WRITE_FILE
    for path, rights in rules.items():
        if not os.path.exists(path):
            continue
        if not os.path.isdir(path):
            rights &= READ_FILE | WRITE_FILE
        file = os.open(path, os.O_PATH)
        rule = struct.pack("=Qi", rights & handled, file)
        checked(libc.syscall(445, ruleset, 1, rule, 0), "landlock_add_rule")
        os.close(file)
    checked(libc.syscall(446, ruleset, 0), "landlock_restrict_self")
    os.close(ruleset)
    return version


def seccomp(libc: Any) -> None:
    """Have the kernel refuse the calls of `REFUSED` and `CONDITIONS`, to root as well."""
    machine = os.uname().machine
    if machine not in MACHINES or sys.maxsize < 2**32:
        raise Refusal(f"its call numbers are known for {' and '.join(MACHINES)}, not {machine}")
    instructions = ctypes.create_string_buffer(seccomp_filter(machine, os.getpid()))
    count = len(instructions) // 8
    program = ctypes.create_string_buffer(struct.pack("HP", count, ctypes.addressof(instructions)))
    checked(libc.prctl(22, 2, ctypes.addressof(program), 0, 0), "prctl(PR_SET_SECCOMP)")


def seccomp_filter(machine: str, pid: int) -> bytes:
    """Write the filter in classic BPF: loads, comparisons that skip instructions, verdicts."""
    place, arch = MACHINES[machine]
    load, keep_bits, equal, at_least, verdict = 0x20, 0x54, 0x15, 0x35, 0x06
    allow, eperm, enosys, kill = 0x7FFF0000, 0x50001, 0x50026, 0x80000000

    def code(operation: int, k: int, if_true: int = 0, if_false: int = 0) -> bytes:
        return struct.pack("=HBBI", operation, if_true, if_false, k)

    text = code(load, 4) + code(equal, arch, 1) + code(verdict, kill)
    text += code(load, 0)  # the call's number
    text += code(at_least, FIRST_NEW_CALL, 0, 1) + code(verdict, enosys)
    for number in REFUSED.split()[1 + place :: 3]:
        if number != "-":
            text += code(equal, int(number), 0, 1) + code(verdict, eperm)
    for numbers, argument, bits, value, allowed in CONDITIONS:
        word = 16 + 8 * argument
        text += code(equal, numbers[place], 0, 7)
        text += code(load, word + 4) + code(equal, 0, 0, 3)  # a high word that is set is refused
        text += code(load, word) + code(keep_bits, bits)
        text += code(equal, pid if value is None else value, *((1, 0) if allowed else (0, 1)))
        text += code(verdict, eperm) + code(verdict, allow)
    return text + code(verdict, allow)


def audit_hook(
    folder: str, readable: Iterable[str], refused: tuple[str, ...]
) -> Callable[[str, tuple[Any, ...]], None]:
    """Make a hook that guards files, and refuses the events that begin with one of some names."""
    roots = [os.path.realpath(path) for path in (*readable, os.devnull, folder)]
    own = [os.path.realpath(folder)]
    changing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC

    def check(path: Any, allowed: list[str]) -> None:
        if not isinstance(path, int):  # what is open already has been checked
            real = os.path.realpath(os.fsdecode("." if path is None else path))
            if not any(real == root or real.startswith(root + os.sep) for root in allowed):
                raise PermissionError(1, "Not permitted to a program under test", path)

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            check(args[0], [*own, os.devnull] if args[2] & changing else roots)
        elif event in ("os.listdir", "os.scandir"):
            check(args[0], roots)
        elif event in ("os.remove", "os.truncate"):
            check(args[0], own)
        elif event == "os.rename":
            check(args[0], own)
            check(args[1], own)
        elif event == "sqlite3.connect":
            address = os.fsdecode(args[0])
            check("/" if address.startswith("file:") else address, own)
        elif event.startswith(refused) and event not in HARMLESS:
            raise PermissionError(1, f"{event} is not permitted to a program under test")

    return hook


def put_up_barriers(arguments: list[str]) -> str:
    """Put up every layer that was asked for.

    Returns:
        The layers that hold, by name.
    """
    seconds, memory_bytes, file_bytes, layers, *readable = arguments
    folder = os.getcwd()
    limit(int(seconds), int(memory_bytes), int(file_bytes), may_fork="seccomp" not in layers)
    held, version = ["limits"], 0
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        libc.prctl.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]
        give_up_privileges(libc)
        if "landlock" in layers:
            version = landlock(libc, folder, readable)
            held += ["landlock"] * (version > 0)
        if "seccomp" in layers:
            seccomp(libc)
            held += ["seccomp"]
    if version < FIRST_WHOLE_LANDLOCK or "seccomp" not in held:
        refused = FILE_EVENTS if "seccomp" in held else FILE_EVENTS + OTHER_EVENTS
        sys.addaudithook(audit_hook(folder, readable, refused))
        held += ["audit"]
    os.close(os.open(os.__file__, os.O_RDONLY))  # The program has to be able to import.
    return " ".join(held)


def describe(error: BaseException, program: str) -> str:
    """Say in one line what a program died of; an assertion without a message is quoted."""
    name, line = type(error).__name__, 0
    try:
        text = str(error).strip()
    except BaseException:
        text = ""
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == PROGRAM:
            line = trace.tb_lineno
        trace = trace.tb_next
    if not text and isinstance(error, AssertionError):
        text = "".join(program.split("\n")[line - 1 : line]).strip()
    return ": ".join(filter(None, (name, " ".join(text.split()))))[:SHOWN]


def main(results: int, arguments: list[str]) -> None:
    """Read the program, shut it in, run it, and write how it went."""
    token, _, program = sys.stdin.buffer.read().decode("utf-8", "surrogatepass").partition("\n")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    # A program may overwrite these names.
    write, leave, encode = os.write, os._exit, str.encode
    try:
        write(results, encode(f"ready {put_up_barriers(arguments)}\n"))
    except Exception as error:
        write(results, encode(f"refused {describe(error, '')}\n", "utf-8", "replace"))
        leave(1)
    sys.argv[:] = [PROGRAM]
    module = types.ModuleType("__main__")  # where pickle and dataclasses look for the program
    sys.modules["__main__"] = module
    try:
        exec(compile(program, PROGRAM, "exec", dont_inherit=True), module.__dict__)
        verdict = token
    except MemoryError:
        verdict = "memory"
    except BaseException as error:
        verdict = describe(error, program)
    write(results, encode(f"{verdict}\n", "utf-8", "replace"))
    leave(0)  # at once: no handlers, no threads that go on


def checked(result: int, call: str) -> None:
    """Refuse where a call of the C library failed."""
    if result < 0:
        raise Refusal(f"{call}: {os.strerror(ctypes.get_errno())}")


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
