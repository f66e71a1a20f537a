"""A file is written whole or not at all, and it is told who is at work on one."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_peft.atomic import (
    alone_at,
    append_text,
    hold,
    is_held,
    write_atomically,
    write_folder,
    write_text,
)


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


def test_a_file_may_be_held_by_several_that_share_it(tmp_path: Path) -> None:
    with (tmp_path / "a").open("a+") as file:
        assert hold(file, shared=True)
        program = (
            "import sys; from lightning_peft.atomic import hold; file = open(sys.argv[1], 'a+')\n"
            "print(hold(file, shared=True), hold(file))"
        )
        said = subprocess.run(
            [sys.executable, "-c", program, str(tmp_path / "a")], capture_output=True, text=True
        ).stdout
        assert said == "True False\n"


def test_a_folder_is_written_whole_over_an_earlier_one(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    write_folder(folder, lambda part: (part / "a").write_text("1"))
    with pytest.raises(OSError, match="not empty") as caught:
        write_folder(folder, lambda part: (part / "b").touch())
    assert caught.value.errno == errno.ENOTEMPTY
    write_folder(folder, lambda part: (part / "b").write_text("2"), over=True)
    assert [(p.name, p.read_text()) for p in folder.iterdir()] == [("b", "2")]

    def fail(part: Path) -> None:
        (part / "c").touch()
        raise KeyError("no")

    with pytest.raises(KeyError):
        write_folder(folder, fail, over=True)
    assert [p.name for p in folder.iterdir()] == ["b"]
    assert list(tmp_path.iterdir()) == [folder]


def test_lines_are_added_and_a_failure_names_the_file(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "ä\n")
    append_text(tmp_path / "a", "ö\n")
    assert (tmp_path / "a").read_text(encoding="utf-8") == "ä\nö\n"
    with pytest.raises(OSError, match="No such file") as caught:
        append_text(tmp_path / "gone" / "a", "x")
    assert caught.value.filename == str(tmp_path / "gone" / "a")


def test_a_file_that_is_read_and_written_anew_loses_nothing(tmp_path: Path) -> None:
    """Four processes count in one file."""
    path = tmp_path / "count"
    path.write_text("0")
    program = (
        "import sys; from pathlib import Path\n"
        "from lightning_peft.atomic import alone_at, write_text\n"
        "path = Path(sys.argv[1])\n"
        "for _ in range(50):\n"
        "    with alone_at(path): write_text(path, str(int(path.read_text()) + 1))\n"
    )
    others = [subprocess.Popen([sys.executable, "-c", program, str(path)]) for _ in range(3)]
    for _ in range(50):
        with alone_at(path):
            write_text(path, str(int(path.read_text()) + 1))
    assert [other.wait() for other in others] == [0, 0, 0]
    assert path.read_text() == "200"
