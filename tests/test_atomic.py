"""A file is written whole or not at all, and it is told who is at work on one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lightning_peft.atomic import hold, is_held, write_atomically


def test_a_file_is_written_into_a_new_folder(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.txt"
    write_atomically(path, lambda part: part.write_text("x"))
    assert path.read_text() == "x"
    assert list(path.parent.iterdir()) == [path]


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")

    def fail(part: Path) -> None:
        part.write_text("half")
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        write_atomically(path, fail)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_written_to_lies_in_the_same_folder(tmp_path: Path) -> None:
    """A move to another file system would be a copy."""
    seen: list[Path] = []

    def write(part: Path) -> None:
        seen.append(part)
        part.touch()

    write_atomically(tmp_path / "a.txt", write)
    assert seen[0].parent == tmp_path
    assert seen[0].name.startswith(".a.txt.")


@pytest.mark.skipif(sys.platform == "win32", reason="not a POSIX system")
def test_a_file_is_held_as_long_as_another_process_lives(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.touch()
    assert not is_held(path)
    program = (
        "import sys; from lightning_peft.atomic import hold\n"
        f"file = open({str(path)!r}, 'a'); hold(file); print('held', flush=True)\n"
        "sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None
    assert other.stdout.readline() == "held\n"
    assert is_held(path)
    other.communicate()
    assert not is_held(path)


def test_ones_own_file_is_not_held_by_another(tmp_path: Path) -> None:
    with (tmp_path / "a").open("a") as file:
        hold(file)
        assert not is_held(tmp_path / "a")


@pytest.mark.skipif(sys.platform == "win32", reason="not a POSIX system")
def test_what_another_process_holds_cannot_be_held(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with path.open("a") as file:
        assert hold(file)
        assert hold(file)
        program = f"from lightning_peft.atomic import hold; print(hold(open({str(path)!r}, 'a')))"
        tried = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert tried.stdout == "False\n"
