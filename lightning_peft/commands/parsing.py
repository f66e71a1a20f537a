"""How every command begins: a parser that bears its name."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

from lightning_peft.errors import UserError


class CommandParser(argparse.ArgumentParser):
    """argparse's parser, which raises a ``UserError`` where that one prints how it is used."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong.

        Args:
            message: What argparse says.

        Raises:
            UserError: With the sentence.
        """
        name, *about = message.removeprefix("argument ").split(": ")
        raise UserError(f"{name}: {': '.join(about)}." if about else f"{message}.")


def command_parser(
    module: str,
    description: str | None,
    kind: type[argparse.ArgumentParser] = CommandParser,
    **options: Any,
) -> Any:
    """The parser of a command.

    Args:
        module: ``__name__`` of the command's file, which is named after it.
        description: What its help says first.
        kind: The parser's class.
        options: Further arguments of that class.
    """
    command = module.rpartition(".")[2]
    return kind(prog=f"lightning-peft {command}", description=description, **options)
