"""Every command's parser bears its name."""

from __future__ import annotations

import argparse

import pytest

from lightning_peft.commands.parsing import CommandParser, command_parser
from lightning_peft.errors import UserError


class Other(argparse.ArgumentParser):
    pass


def test_a_command_is_named_after_its_file(capsys: pytest.CaptureFixture[str]) -> None:
    parser = command_parser("lightning_peft.commands.export", "What it does.", epilog="The end.")
    assert type(parser) is CommandParser
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    said = capsys.readouterr().out
    assert said.startswith("usage: lightning-peft export [-h]\n\nWhat it does.\n")
    assert said.endswith("\nThe end.\n")


def test_the_parser_may_be_of_another_class() -> None:
    parser = command_parser("commands.x", None, Other, allow_abbrev=False)
    assert type(parser) is Other
    assert (parser.prog, parser.allow_abbrev) == ("lightning-peft x", False)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--rows", "x"], "--rows: invalid int value: 'x'."),
        ([], "the following arguments are required: --rows."),
    ],
)
def test_a_wrong_option_is_one_sentence(words: list[str], sentence: str) -> None:
    parser = command_parser("lightning_peft.commands.export", None)
    parser.add_argument("--rows", type=int, required=True)
    with pytest.raises(UserError) as error:
        parser.parse_args(words)
    assert str(error.value) == sentence
