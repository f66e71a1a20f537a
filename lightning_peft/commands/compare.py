"""``lightning-peft compare``: many runs under one protocol, and a table that judges them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from lightning_peft.commands.parsing import command_parser
from lightning_peft.comparison.schema import Comparison, Match, Rates, read_once
from lightning_peft.settings.parser import FriendlyParser

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
    files = _files(own)
    given = {name: value for path in files for name, value in read_once(path).items()}
    options = parser.parse_args(own)
    for name in ("runs", "overrides", "grid"):
        # jsonargparse fills in the arguments of every class that it sees, also those that come
        # later, like a gate's rank: these stay as they were written.
        if name in given and not any(word.startswith(f"--{name}") for word in own):
            options[name] = given[name]
    folder = Path(files[-1]).absolute().parent if files else Path()
    return _comparison(options), folder, extra, options


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


def _files(words: list[str]) -> list[str]:
    pairs = zip(words, [*words[1:], ""], strict=True)
    named = [value for word, value in pairs if word in ("--config", "-c")]
    return named + [w.removeprefix("--config=") for w in words if w.startswith("--config=")]
