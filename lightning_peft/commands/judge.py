"""``lightning-peft judge``: have a language model rate answers to MT-Bench.

Any endpoint of the OpenAI chat protocol serves. As in FastChat, a judge answers at temperature 0
and in at most 2048 tokens. Judgments are kept as they come, and none is asked for twice.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from jsonargparse import ArgumentParser

from lightning_peft.commands.parsing import command_parser
from lightning_peft.errors import UserError
from lightning_peft.judging.judge import judge
from lightning_peft.settings.diagnosis import diagnose, shorten


def main(words: list[str]) -> None:
    """Judge the answers in a file and print the means.

    Args:
        words: The command's options.

    Raises:
        UserError: As `judge` does, and for options that it does not take.
    """
    parser = command_parser(
        __name__, __doc__, ArgumentParser, exit_on_error=False, allow_abbrev=False
    )
    parser.add_function_arguments(judge)
    try:
        options = parser.parse_args(words)
    except argparse.ArgumentError as error:
        raise UserError(diagnose(parser, words, Path()) or shorten(str(error))) from error
    found = judge(**options.as_dict())
    turns = {name.replace("_", " "): found[name] for name in ("turn_1", "turn_2", "both")}
    for name, mean in {**turns, **found["categories"]}.items():
        print(f"{name:12}{'none' if mean is None else f'{mean:.2f}'}")
    print(f"{found['invalid']} of {found['judgments']} in {found['output']} have no rating")
