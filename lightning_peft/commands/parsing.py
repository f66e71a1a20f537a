"""How every command begins: a parser that bears its name."""

from __future__ import annotations

import argparse
from typing import Any


def command_parser(
    module: str,
    description: str | None,
    kind: type[argparse.ArgumentParser] = argparse.ArgumentParser,
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
