"""``lightning-peft compare``: many runs under one protocol, and a table that judges them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from lightning_peft.commands.parsing import command_parser
from lightning_peft.comparison.schema import Comparison, Match, Rates
from lightning_peft.errors import UserError
from lightning_peft.settings.arguments import actions_of, refuse_null, show
from lightning_peft.settings.parser import FriendlyParser
from lightning_peft.settings.reading import read_file
from lightning_peft.settings.tree import read_words

DESCRIPTION = (
    "Options of fit (--data.data_dir DATA) are laid over every run. Started again, a comparison "
    "goes on."
)
# Options of fit that are laid over every run.
FIT = ("--trainer", "--model", "--data", "--importance", "--checkpoint.", "--record")


def main(words: list[str]) -> None:
    """Plan a comparison, do what is left of it, and write its table and pictures.

    Args:
        words: The command's options.

    Raises:
        UserError: In one sentence, if anything is wrong, before anything runs.
    """
    comparison, folder, extra, options = read_comparison(words)

    from lightning_peft.comparison.outcomes import Outcomes
    from lightning_peft.comparison.pictures import save_pictures
    from lightning_peft.comparison.plan import make_plan
    from lightning_peft.comparison.runner import run_jobs
    from lightning_peft.comparison.table import write_table

    plan = make_plan(comparison, folder, extra)
    print(plan, flush=True)
    if options.plan_only:
        return
    if not options.table_only:
        run_jobs(plan, options.retry_failed)
    outcomes = Outcomes(plan)
    print(write_table(outcomes, plan.folder))
    for path in (plan.folder / "results.csv", *save_pictures(outcomes, plan.folder)):
        print(path)


def read_comparison(words: list[str]) -> tuple[Comparison, Path, list[str], Namespace]:
    """Read what is asked for.

    Args:
        words: The command's options.

    Returns:
        The comparison, the folder of its file, the options of ``fit``, and all others.

    Raises:
        UserError: In one sentence, if a key or value is wrong.
    """
    own, extra = _split(words)
    parser = command_parser(__name__, DESCRIPTION, FriendlyParser)
    parser.add_argument("-c", "--config", action="config", help="The comparison's file.")
    parser.add_class_arguments(Comparison, as_group=False)
    parser.add_argument("--plan_only", type=bool, default=False, help="Say what would run.")
    parser.add_argument("--table_only", type=bool, default=False, help="Judge what is there.")
    parser.add_argument(
        "--retry_failed", type=bool, default=False, help="Try again what failed before."
    )
    asks = any(word.startswith(("-h", "--help", "--print_config")) for word in own)
    files = [] if asks else [value for key, value in read_words(own) if key == "config"]
    given = {name: value for path in files for name, value in read_file(path, Path()).items()}
    for name, value in given.items():
        if isinstance(value, dict):
            _refuse_keys(value, name)
    options = parser.parse_args(own)
    _refuse_numbers(parser, options)
    for name in ("runs", "overrides", "grid"):
        # jsonargparse fills in the arguments of every class that it sees, also those that come
        # later, like a gate's rank: these stay as they were written.
        if name in given and not any(word.startswith(f"--{name}") for word in own):
            options[name] = given[name]
    folder = Path(files[-1]).absolute().parent if files else Path()
    return _comparison(options), folder, extra, options


def _refuse_keys(values: dict[Any, Any], key: str) -> None:
    """Refuse a run or a setting that YAML does not read as a word, such as 1 or null."""
    for name, value in values.items():
        if not isinstance(name, str):
            raise UserError(f"{key}: the name {show(name)} is no text; put it in quotes.")
        if isinstance(value, dict):
            _refuse_keys(value, f"{key}.{name}")


def _refuse_numbers(parser: FriendlyParser, options: Namespace) -> None:
    """Refuse null for what has to be given, and numbers that nothing can be compared with."""
    for key, action in actions_of(parser).items():
        refuse_null(action, options.get(key), key)
    for name in ("rates", "match"):
        for key, value in (_plain(options[name]) or {}).items():
            numbers = value if isinstance(value, list) else [value]
            for number in numbers:
                if isinstance(number, float) and not math.isfinite(number):
                    raise UserError(f"{name}.{key}: {number} is no number to work with.")
                if name == "match" and type(number) in (int, float) and number < 0:
                    raise UserError(f"{name}.{key}: {number} is below zero.")


def _comparison(options: Namespace) -> Comparison:
    """The comparison of parsed options; classes that its settings name are not made."""
    given = {name: _plain(options[name]) for name in Comparison.__dataclass_fields__}
    for name, cls in (("rates", Rates), ("match", Match)):
        if given[name] is not None:
            given[name] = cls(**given[name])
    return Comparison(**given)


def _plain(value: Any) -> Any:
    if isinstance(value, Namespace):
        value = value.as_dict()
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list) else value


def _split(words: list[str]) -> tuple[list[str], list[str]]:
    """The comparison's own options, and those of fit."""
    own: list[str] = []
    extra: list[str] = []
    target = own
    for word in words:
        if word.startswith("--"):
            target = extra if word.startswith(FIT) else own
        target.append(word)
    return own, extra
