"""What a comparison's file may say."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from lightning_peft.errors import UserError

# A configuration's file, settings by dotted key, or both in the order in which they are laid.
Settings = str | dict[str, Any] | list[str | dict[str, Any]]


@dataclass
class Rates:
    """Values of one key that every run is tried with, before the best of them is kept for it.

    Args:
        values: To try, such as learning rates.
        values_of: By run, others: as many, for a fair choice.
        key: Which setting they are of.
        choose_by: A metric of validation, as fit leaves it in ``run.json``; the one that the runs
            are validated by when None: accuracy, or the first metric of a task with classes.
        best: Whether its highest or its lowest value is best.
        seeds: The seeds to choose by, over which the metric is averaged; the comparison's first
            when None. The best value is then trained with all of the comparison's seeds.
    """

    values: list[float]
    values_of: dict[str, list[float]] = field(default_factory=dict)
    key: str = "model.optimizer.lr"
    choose_by: str | None = None
    best: Literal["highest", "lowest"] = "highest"
    seeds: list[int] | None = None


@dataclass
class Match:
    """A budget that all runs get.

    Args:
        parameters: Trainable parameters at the end of a run, met by the choice of a rank.
        tolerance: How far off they may be, as a share.
        rank: The key that is chosen.
        rank_of: By run, another key: ``model.adapter.target_r`` where a method ends at that.
        leave: Runs that keep their own size, since no rank decides it.
        steps: Optimizer steps.
        seconds: Seconds of training, validation included; ``trainer.max_steps`` still ends a run
            and sets the length of its learning-rate schedule.
    """

    parameters: int | None = None
    tolerance: float = 0.05
    rank: str = "model.adapter.r"
    rank_of: dict[str, str] = field(default_factory=dict)
    leave: list[str] = field(default_factory=list)
    steps: int | None = None
    seconds: float | None = None


@dataclass
class Comparison:
    """A grid of configurations, seeds and overrides under one protocol.

    Args:
        runs: By name what is run: a configuration's file, settings by dotted key, or a list of
            both, laid over the base in their order. Files are looked for beside the comparison's.
        folder: Where everything goes.
        base: Configurations laid over one another, under every run.
        overrides: Settings by dotted key over the base, under the run's own.
        grid: By run, keys with the values to try in its place, every one with every other:
            ``{droplora: {model.adapter.p: [0.1, 0.3]}}`` makes ``droplora p=0.1`` and
            ``droplora p=0.3``.
        seeds: Of adapters, masks and the order of data (``seed_everything``).
        baseline: The run that differences are taken to, paired by seed; the first when None.
        baselines: By run, another one.
        rates: Values of one key, the best of which is chosen for each run on validation.
        match: Budgets that all runs get.
        score: What runs are judged by: a metric of ``test``, which begins with ``test/``, or one of
            validation, and then nothing is tested. None is what the data module names first: the
            average over its tasks, or the first metric of the first one.
        also: Further metrics, each with a table of its own.
        checkpoint: What is tested: ``last``, or a file in ``checkpoints/`` such as ``best.ckpt``.
        curve: A metric of ``metrics.csv``, drawn over steps; the one that the runs are validated by
            when None.
        workers: Runs at a time, each in a process of its own; on several GPUs each has one.
        threads: Processor threads of each; the machine's, shared among the workers, when None.
    """

    runs: dict[str, Settings]
    folder: str
    base: list[str] = field(default_factory=list)
    overrides: dict[str, Any] = field(default_factory=dict)
    grid: dict[str, dict[str, list[Any]]] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2, 3, 4])
    baseline: str | None = None
    baselines: dict[str, str] = field(default_factory=dict)
    rates: Rates | None = None
    match: Match | None = None
    score: str | None = None
    also: list[str] = field(default_factory=list)
    checkpoint: str = "last"
    curve: str | None = None
    workers: int = 1
    threads: int | None = None


def check(comparison: Comparison) -> None:
    """Refuse names and numbers that cannot be, whatever the runs are.

    Args:
        comparison: As given.

    Raises:
        UserError: Naming the key.
    """
    _check_given(comparison)
    rates, match = comparison.rates, comparison.match
    for name in comparison.runs:
        check_name(name)
    _check_places(comparison)
    numbers: dict[str, Any] = {"seeds": comparison.seeds}
    if rates:
        numbers |= {"rates.values": rates.values, "rates.seeds": rates.seeds}
        numbers |= {f"rates.values_of.{name}": v for name, v in rates.values_of.items()}
    for key, values in numbers.items():
        if values is not None and (not values or len(set(values)) < len(values)):
            raise UserError(f"{key} must be different numbers, at least one, got {values}.")
        _check_numbers(key, values or ())
    for key, count in (("workers", comparison.workers), ("threads", comparison.threads)):
        if count is not None and count < 1:
            raise UserError(f"{key} must be at least 1, got {count}.")
    if match:
        _check_match(match)


def _check_given(comparison: Comparison) -> None:
    """Refuse null where it stands for no value, which parsers let through."""
    empty = Comparison({}, "")
    groups: list[tuple[str, Any, Any]] = [("", comparison, empty)]
    if comparison.rates:
        groups.append(("rates.", comparison.rates, Rates([])))
    if comparison.match:
        groups.append(("match.", comparison.match, Match()))
    for before, given, plain in groups:
        for one in fields(given):
            if getattr(given, one.name) is None and getattr(plain, one.name) is not None:
                raise UserError(f"{before}{one.name} is null; give a value, or leave the key out.")
            _check_keys(f"{before}{one.name}", getattr(given, one.name))


def _check_keys(place: str, value: Any) -> None:
    """Refuse YAML's own idea of 3, yes and null where names stand."""
    for key, inner in value.items() if isinstance(value, dict) else ():
        if not isinstance(key, str):
            raise UserError(f"{place}: {key} is no name as it stands; write it in quotes.")
        _check_keys(f"{place}.{key}", inner)
    for inner in value if isinstance(value, list) else ():
        _check_keys(place, inner)


def check_name(name: str) -> None:
    """Refuse a run's name that can be no folder and no cell of a table.

    Args:
        name: As given, or with a grid's values.

    Raises:
        UserError: Naming the run.
    """
    if not name or not re.fullmatch(r"[^/\\\0]+", name) or name.startswith("."):
        raise UserError(f"runs.{name}: a run's name is a folder, so it holds no slash.")
    if not name.isprintable() or len(name) > 100 or name != name.strip():
        raise UserError(
            f"runs.{name[:100]!r}: a run's name is a folder and a cell of tables, so it is at most "
            "100 printable characters, and no blank at either end."
        )


def _check_places(comparison: Comparison) -> None:
    folder, checkpoint = comparison.folder, comparison.checkpoint
    try:
        wrong = not folder.strip() or not folder.isprintable() or Path(folder).is_file()
    except OSError:  # a name that is too long
        wrong = True
    if wrong:
        shown = repr(folder if len(folder) <= 100 else folder[:100] + " …")
        raise UserError(f"folder: {shown} can be no folder; give one for the comparison.")
    if Path(checkpoint).name != checkpoint or checkpoint in ("", ".", ".."):
        raise UserError(
            f"checkpoint: {checkpoint!r} is neither last nor a file in checkpoints/; give one such "
            "as best.ckpt, without a folder."
        )


def _check_numbers(key: str, values: Sequence[float]) -> None:
    """Seeds are those of ``seed_everything``; rates are told apart as their folders' names are."""
    for value in values:
        if key.endswith("seeds") and not 0 <= value < 1 << 32:
            raise UserError(f"{key}: {value} is no seed; those are 0 to {(1 << 32) - 1}.")
        if not math.isfinite(value):
            raise UserError(f"{key}: {value} is no number to try.")
    names = [f"{value:g}" for value in values]
    if not key.endswith("seeds") and len(set(names)) < len(names):
        raise UserError(f"{key}: {values} are not different in their first six digits.")


def _check_match(match: Match) -> None:
    if not 0 <= match.tolerance < 1:
        raise UserError(f"match.tolerance must lie in [0, 1), got {match.tolerance}.")
    budgets = {"parameters": match.parameters, "steps": match.steps, "seconds": match.seconds}
    given = {key: value for key, value in budgets.items() if value is not None}
    if not any(given.values()):
        raise UserError("match needs one of parameters, steps and seconds, above zero.")
    for key, value in given.items():
        if not 0 < value < math.inf:
            raise UserError(f"match.{key} must be a number above zero, got {value}.")
