"""The command line chooses a command, prints a user's mistake, and lets everything else through."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from lightning_peft import __version__, cli
from lightning_peft.errors import MissingFile, UserError


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes every command raise an error."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delenv("LIGHTNING_PEFT_TRACEBACK", raising=False)

    def make(error: BaseException) -> None:
        def main(words: list[str]) -> None:
            raise error

        monkeypatch.setattr(cli.importlib, "import_module", lambda name: SimpleNamespace(main=main))

    return make


@pytest.mark.parametrize("kind", [UserError, MissingFile])
def test_a_users_mistake_is_one_sentence(
    command: Any, capsys: pytest.CaptureFixture[str], kind: type[UserError]
) -> None:
    command(kind("a.b is wrong."))
    with pytest.raises(SystemExit) as info:
        cli.main(["fit"])
    assert info.value.code == 2
    assert capsys.readouterr().err == "error: a.b is wrong.\n"


@pytest.mark.parametrize(
    "error", [ValueError("a bug"), FileNotFoundError(2, "No such file"), RuntimeError("other")]
)
def test_every_other_error_keeps_its_traceback(command: Any, error: Exception) -> None:
    command(error)
    with pytest.raises(type(error)) as info:
        cli.main(["report"])
    assert info.value is error


def test_the_traceback_of_a_sentence_is_shown_when_asked_for(
    command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIGHTNING_PEFT_TRACEBACK", "1")
    command(UserError("a.b is wrong."))
    with pytest.raises(UserError, match="a.b is wrong"):
        cli.main(["fit"])


@pytest.mark.parametrize(("words", "code"), [(["--help"], 0), (["-h"], 0), ([], 2)])
def test_help_names_every_command(
    words: list[str], code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as info:
        cli.main(words)
    assert info.value.code == code
    said = capsys.readouterr().out
    assert all(f"\n  {name} " in said for name in (*cli.TRAINER_COMMANDS, *cli.COMMANDS))


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["--version"])
    assert capsys.readouterr().out == f"lightning-peft {__version__}\n"


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("comprae", "error: 'comprae' is no command; did you mean compare?\n"),
        ("xyz", "error: 'xyz' is no command; see lightning-peft --help.\n"),
    ],
)
def test_a_word_that_is_no_command(
    word: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        cli.main([word])
    assert capsys.readouterr().err == sentence


def test_help_imports_nothing_heavy() -> None:
    program = (
        "import sys, lightning_peft.cli as cli\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "print([m for m in ('torch', 'lightning', 'transformers', 'jsonargparse', 'yaml')"
        " if m in sys.modules], file=sys.stderr)"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.stderr == "[]\n"
