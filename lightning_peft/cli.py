"""``lightning-peft``: the entry point, light enough that ``--help`` comes at once.

``fit``, ``validate``, ``test`` and ``predict`` are LightningCLI's; the further commands stand in a
table here, each imported when it is called.
"""

from __future__ import annotations

import gc
import importlib
import os
import sys
from typing import Any

from lightning_peft.errors import UserError, of_system

TRAINER_COMMANDS = {
    "fit": "train an adapter",
    "validate": "validation loss and accuracy of a checkpoint",
    "test": "generate answers, write them down and score them",
    "predict": "generate answers and write them down",
}
COMMANDS = {
    "export": ("lightning_peft.commands.export", "adapter or merged model of a checkpoint"),
    "report": ("lightning_peft.commands.report", "pictures and a page of a run's folder"),
    "compare": ("lightning_peft.commands.compare", "many runs under one protocol, and their table"),
    "estimate": (
        "lightning_peft.commands.estimate",
        "parameters, memory, sizes of a run",
    ),
    "judge": ("lightning_peft.commands.judge", "a language model's ratings of answers to MT-Bench"),
}

USAGE = """usage: lightning-peft COMMAND [options]

commands:
{rows}

lightning-peft COMMAND --help tells each one's options, and
lightning-peft fit --model.adapter.help DropLoRA those of one strategy.
LIGHTNING_PEFT_TRACEBACK=1 shows the traceback behind an error's sentence."""


def main(args: list[str] | None = None) -> None:
    """Run one command.

    Args:
        args: Command-line words; those of the process when None.
    """
    words = sys.argv[1:] if args is None else args
    if not words or words[0] in ("-h", "--help"):
        rows = {**TRAINER_COMMANDS, **{name: text for name, (_, text) in COMMANDS.items()}}
        print(USAGE.format(rows="\n".join(f"  {name:10}{text}" for name, text in rows.items())))
        sys.exit(0 if words else 2)
    if words[0] == "--version":
        from lightning_peft import __version__

        print(f"lightning-peft {__version__}")
        return
    # A console script does not have the current folder on its path, where a user's own classes are.
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        _dispatch(words)
    except UserError as error:
        if os.environ.get("LIGHTNING_PEFT_TRACEBACK") == "1":
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        told = of_system(error)
        if told is None or os.environ.get("LIGHTNING_PEFT_TRACEBACK") == "1":
            raise
        print(f"error: {told}", file=sys.stderr)
        sys.exit(2)


def _dispatch(words: list[str]) -> None:
    if words[0] in COMMANDS:
        _imported(COMMANDS[words[0]][0]).main(words[1:])
    elif words[0] in TRAINER_COMMANDS:
        _imported("lightning_peft.commands.train").main(words)
    else:
        import difflib

        near = difflib.get_close_matches(words[0], [*TRAINER_COMMANDS, *COMMANDS], n=1)
        hint = f"did you mean {near[0]}?" if near else "see lightning-peft --help."
        raise UserError(f"{words[0]!r} is no command; {hint}")


def _imported(name: str) -> Any:
    """Import a command's module, without the tenth of the time that garbage collection takes.

    Five thousand modules make many objects, none of which is garbage.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        return importlib.import_module(name)
    finally:
        if collects:
            gc.enable()
