"""What a user got wrong is told by its class, and is a ValueError still."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from lightning_peft.errors import MissingFile, UserError, named, naming, of_system, shown


def test_a_users_mistake_is_a_value_error() -> None:
    assert issubclass(UserError, ValueError)
    assert str(UserError("a is wrong.")) == "a is wrong."


def test_a_missing_file_is_both_and_says_its_sentence_alone() -> None:
    error = MissingFile("x does not exist.")
    assert isinstance(error, UserError)
    assert isinstance(error, FileNotFoundError)
    assert str(error) == "x does not exist."


@pytest.mark.parametrize(
    ("number", "sentence"),
    [
        (errno.ENOSPC, "a/b: No space left on device; free some space; a run goes on with"),
        (errno.EACCES, "a/b: Permission denied; give one that this user may read and write."),
        (errno.ENOTDIR, "a/b: Not a directory; a file stands where a folder should be; give"),
        (errno.ELOOP, "its links lead in a circle"),
    ],
)
def test_what_the_system_refuses_is_a_sentence_with_path_and_reason(
    number: int, sentence: str
) -> None:
    told = of_system(OSError(number, os.strerror(number), "a/b"))
    assert isinstance(told, UserError)
    assert sentence in str(told)


def test_an_error_that_is_no_files_stays() -> None:
    assert of_system(OSError("no model of this name")) is None
    assert of_system(OSError(errno.ENOSPC, "no space")) is None
    assert of_system(OSError(errno.ECONNRESET, "reset", "a")) is None


def test_a_name_of_thousands_of_characters_is_cut_in_its_middle() -> None:
    told = str(of_system(OSError(errno.ENAMETOOLONG, "x", "a" * 5000 + "end")))
    assert len(told) < 400
    assert "… " in told
    assert "end: File name too long; give a shorter name." in told


def test_a_write_that_knows_no_name_is_given_one() -> None:
    with pytest.raises(OSError, match="disk") as caught, naming(Path("file")):
        raise OSError(errno.ENOSPC, "disk")
    assert caught.value.filename == "file"
    with pytest.raises(OSError, match="x") as caught, naming("file"):
        raise OSError(errno.EACCES, "x", "its own")
    assert caught.value.filename == "its own"


def test_a_librarys_words_for_a_full_disk_are_the_systems_error() -> None:
    """As safetensors says it."""
    with pytest.raises(OSError, match="No space") as caught, naming("file"):
        raise RuntimeError("I/O error: No space left on device (os error 28)")
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, "file")
    with pytest.raises(KeyError), naming("file"):
        raise KeyError("x")


def test_what_a_library_raises_after_the_systems_error_is_that_error() -> None:
    """As torch does, whose writer of archives is closed after the disk has refused a record."""

    def save() -> None:
        try:
            raise OSError(errno.ENOSPC, "no space")
        except OSError:
            raise RuntimeError("unexpected pos 64 vs 0")  # noqa: B904

    with pytest.raises(OSError, match="No space") as caught, naming("file"):
        save()
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, "file")


def test_values_and_names_are_shown_in_one_short_line() -> None:
    assert shown("a\n\x1b[31m") == r"'a\n\x1b[31m'"
    assert shown("x" * 200) == "'" + "x" * 78 + "…"
    assert (named("a.b"), named("a\n"), named(""), named(3)) == ("a.b", r"'a\n'", "''", "3")
    assert (named(" grid"), named("x" * 300, 5)) == ("' grid'", "'xxx…")


def test_a_sentence_is_one_printable_line() -> None:
    for kind in (UserError, MissingFile):
        assert str(kind("runs.a\tb\x1b[31m: né")) == r"runs.a\tb\x1b[31m: né"
