"""What a comparison will run: every run's whole configuration, checked before anything starts."""

from __future__ import annotations

import copy
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_peft.commands.train import KEYS, PeftCLI, make_cli
from lightning_peft.comparison.budget import final_parameters, find_rank
from lightning_peft.comparison.schema import Comparison, Settings
from lightning_peft.errors import MissingFile, UserError
from lightning_peft.settings.diagnosis import hint_at, own_sentence
from lightning_peft.settings.parser import make_module, older_names
from lightning_peft.settings.tree import assign

Words = list[str]


@dataclass(frozen=True)
class Job:
    """One training, and its test.

    Attributes:
        run: Name of the run.
        rate: Value of ``rates.key``, or None without a sweep.
        seed: Of everything.
    """

    run: str
    rate: float | None
    seed: int

    @property
    def label(self) -> str:
        """As shown, and as its folder under the comparison's."""
        rate = "" if self.rate is None else f"/rate={self.rate:g}"
        return f"{self.run}{rate}/seed={self.seed}"


@dataclass
class Plan:
    """A comparison whose settings are all known.

    Attributes:
        comparison: As given.
        trees: By run, its whole configuration for ``fit``, as a file holds it.
        parameters: By run, trainable parameters at the end, where a budget asked for them.
    """

    comparison: Comparison
    trees: dict[str, dict[str, Any]]
    parameters: dict[str, int] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """Where everything goes."""
        return Path(self.comparison.folder).absolute()

    def folder_of(self, job: Job) -> Path:
        """Where one job's run goes."""
        return self.folder / "runs" / job.label

    def __str__(self) -> str:
        """What will run, for printing."""
        comparison = self.comparison
        lines = [f"{len(self.trees)} runs, {self.count()} trainings, in {self.folder}"]
        for run in self.trees:
            count = self.parameters.get(run)
            lines.append(f"  {run}" + ("" if count is None else f": {count:,} parameters"))
        if comparison.rates:
            tried = ", ".join(f"{value:g}" for value in comparison.rates.values)
            lines.append(f"{comparison.rates.key}: {tried}, chosen by {comparison.rates.choose_by}")
        return "\n".join(lines)

    def baseline_of(self, run: str) -> str:
        """The run that another one's difference is taken to."""
        given = self.comparison.baseline or next(iter(self.trees))
        return self.comparison.baselines.get(run, given)

    def rates_of(self, run: str) -> list[float | None]:
        """The values that a run is tried with; None alone where nothing is swept."""
        rates = self.comparison.rates
        return [*rates.values_of.get(run, rates.values)] if rates else [None]

    def sweep(self, run: str) -> Iterator[Job]:
        """The jobs among which a run's rate is chosen."""
        rates = self.comparison.rates
        for rate in self.rates_of(run) if rates else []:
            for seed in (rates and rates.seeds) or self.comparison.seeds[:1]:
                yield Job(run, rate, seed)

    def count(self) -> int:
        """How many trainings there will be: each sweep, and all seeds at the value it chooses."""
        seeds = set(self.comparison.seeds)
        total = 0
        for run in self.trees:
            sweep = list(self.sweep(run))
            first = self.rates_of(run)[0]
            again = {job.seed for job in sweep if job.rate == first}
            total += len(sweep) + len(seeds - again)
        return total

    def settings_of(self, job: Job) -> dict[str, Any]:
        """One job's whole configuration."""
        tree = copy.deepcopy(self.trees[job.run])
        if job.rate is not None and self.comparison.rates:
            assign(tree, self.comparison.rates.key, job.rate)
        tree["seed_everything"] = job.seed
        assign(tree, "trainer.default_root_dir", str(self.folder_of(job)))
        return tree


class Parsed(PeftCLI):
    """The command line up to where classes would be made."""

    def before_instantiate_classes(self) -> None:
        """Look for no folder and no checkpoint."""

    def instantiate_classes(self) -> None:
        """Make nothing."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Run nothing."""


def _is_late(word: str) -> bool:
    """Whether an option is better put into a file.

    On the command line jsonargparse does not take null for every type, and a class below another
    one (a gate, whose rank comes later) only as the last option.
    """
    key, _, value = word.partition("=")
    return value == "null" or (value.startswith("{") and key.count(".") > 1)


class Resolver:
    """Gives whole configurations from files and settings; the parser is made once."""

    def __init__(self) -> None:
        self._cli: PeftCLI | None = None

    def tree(self, words: Words) -> dict[str, Any]:
        """The configuration that ``lightning-peft fit`` would take from these words.

        Args:
            words: Options of ``fit``.

        Raises:
            UserError: In one sentence, if a key or a value is wrong.
        """
        late = [word for word in words if _is_late(word)]
        tree = self._parse([word for word in words if word not in late])
        if not late:
            return tree
        for word in late:
            key, _, value = word.removeprefix("--").partition("=")
            assign(tree, key, yaml.safe_load(value))
        with TemporaryDirectory() as folder:
            path = Path(folder) / "settings.yaml"
            path.write_text(yaml.safe_dump(tree))
            return self._parse(["--config", str(path)])

    def _parse(self, words: Words) -> dict[str, Any]:
        words = ["fit", *words]
        if self._cli is None:
            self._cli = make_cli(words, Parsed)
            parsed = self._cli.config
        else:
            parsed = self._cli.parser.parse_args(words)
        config = parsed["fit"].clone()
        config.pop("config", None)
        with older_names():
            text = self._cli._parser("fit").dump(config, skip_none=False)
        return yaml.safe_load(text)

    def module(self, tree: dict[str, Any]) -> Any:
        """The module of a configuration, its model not loaded.

        Args:
            tree: A whole configuration of ``fit``.

        Raises:
            UserError: As a constructor says it.
        """
        try:
            return make_module(tree["model"])
        except (ValueError, MisconfigurationException) as error:
            sentence = own_sentence(error, KEYS)
            if sentence is None:
                raise
            raise UserError(sentence) from error


def make_plan(
    comparison: Comparison,
    folder: Path,
    extra: Sequence[str] = (),
    resolver: Resolver | None = None,
) -> Plan:
    """Resolve and check every run.

    Args:
        comparison: What is asked for.
        folder: Where files are looked for: that of the comparison's file.
        extra: Options of ``fit`` from the command line, laid over the base like ``overrides``.
        resolver: One whose parser is made already.

    Returns:
        The plan.

    Raises:
        UserError: In one sentence, if anything is wrong.
    """
    _check_names(comparison)
    base = [word for name in comparison.base for word in ("--config", _find(name, folder, "base"))]
    shared = [*base, *to_words(_budget(comparison)), *to_words(comparison.overrides), *extra]
    resolver = resolver or Resolver()
    trees: dict[str, dict[str, Any]] = {}
    options = expand(comparison, folder)
    for run, words in options.items():
        try:
            trees[run] = resolver.tree([*shared, *words])
            if comparison.rates and len(trees) == 1:  # a wrong key is better found now
                key, value = comparison.rates.key, comparison.rates.values[0]
                resolver.tree([*shared, *words, f"--{key}={value}"])
        except ValueError as error:
            raise _in_run(run, error) from error
        assign(trees[run], "trainer.enable_progress_bar", False)
    plan = Plan(comparison, trees)
    _check_known(plan)
    if comparison.match and comparison.match.parameters is not None:
        for run in (run for run in trees if run not in comparison.match.leave):
            _match(plan, run, resolver)
    return plan


def _match(plan: Plan, run: str, resolver: Resolver) -> None:
    """Choose a run's rank, and set it."""
    match = plan.comparison.match
    assert match is not None
    key = match.rank_of.get(run, match.rank)

    def count(rank: int) -> int:
        tree = copy.deepcopy(plan.trees[run])
        assign(tree, key, rank)
        return final_parameters(resolver.module(tree), run)

    try:
        rank, plan.parameters[run] = find_rank(run, match, count)
    except ValueError as error:
        raise _in_run(run, error) from error
    assign(plan.trees[run], key, rank)


def _in_run(run: str, error: ValueError) -> UserError:
    text = str(error)
    return UserError(text if text.startswith("match.") else f"runs.{run}: {text}")


def expand(comparison: Comparison, folder: Path) -> dict[str, Words]:
    """Every run's own options of ``fit``, grids put in the place of their runs.

    Args:
        comparison: What is asked for.
        folder: Where files are looked for.

    Raises:
        UserError: If two runs end with one name, or a grid's run does not exist.
    """
    for name in comparison.grid:
        if name not in comparison.runs:
            raise UserError(f"grid.{name} is no run; {hint_at(name, comparison.runs)}")
    found: dict[str, Words] = {}
    folders: dict[str, str] = {}
    for name, settings in comparison.runs.items():
        words = _words_of(settings, folder, f"runs.{name}")
        for label, more in _points(comparison.grid.get(name, {})):
            full = f"{name} {label}".strip()
            # Names are folders, and not every file system tells capitals apart.
            same = folders.setdefault(_as_folder(full), full)
            if same != full or full in found:
                raise UserError(f"two runs have the name {full!r}; give one another name.")
            found[full] = [*words, *more]
    if not found:
        raise UserError("runs is empty; give at least one.")
    return found


def _points(grid: dict[str, list[Any]]) -> Iterator[tuple[str, Words]]:
    """Each point of a grid: what tells it apart in a name, and its settings."""
    for values in itertools.product(*grid.values()):
        point = dict(zip(grid, values, strict=True))
        label = " ".join(f"{key.rpartition('.')[2]}={_short(v)}" for key, v in point.items())
        yield label, to_words(point)


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value).replace("/", "_")


def _as_folder(name: str) -> str:
    return re.sub(r"[^\w.=+-]+", "_", name).lower()


def _words_of(settings: Settings, folder: Path, key: str) -> Words:
    words: Words = []
    for part in settings if isinstance(settings, list) else [settings]:
        if isinstance(part, str):
            words += ["--config", _find(part, folder, key)]
        else:
            words += to_words(part)
    return words


def to_words(settings: dict[str, Any]) -> Words:
    """Settings by dotted key as options; shorter keys come first, and with them classes.

    Args:
        settings: Values by key; a mapping without ``class_path`` is a level of keys.
    """
    flat = dict(_flatten(settings, ""))
    return [
        f"--{key}={flat[key] if isinstance(flat[key], str) else json.dumps(flat[key])}"
        for key in sorted(flat, key=lambda key: key.count("."))
    ]


def _flatten(settings: dict[str, Any], before: str) -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, dict) and value and "class_path" not in value:
            yield from _flatten(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value


def _find(name: str, folder: Path, key: str) -> str:
    for path in (folder / name, Path(name)):
        if path.is_file():
            return str(path.resolve())
    raise MissingFile(f"{key}: there is no file {name}, neither in {folder} nor here.")


def _budget(comparison: Comparison) -> dict[str, Any]:
    """What matched steps or seconds set."""
    match = comparison.match
    found: dict[str, Any] = {}
    if match and match.steps is not None:
        found |= {"trainer.max_steps": match.steps, "trainer.max_epochs": None}
    if match and match.seconds is not None:
        found["trainer.max_time"] = _clock(match.seconds)
    return found


def _clock(seconds: float) -> str:
    whole = round(seconds)
    days, hours, minutes = whole // 86400, whole // 3600 % 24, whole // 60 % 60
    return f"{days:02}:{hours:02}:{minutes:02}:{whole % 60:02}"


# Checks.


def _check_names(comparison: Comparison) -> None:
    rates, match = comparison.rates, comparison.match
    for name in comparison.runs:
        if not name or not re.fullmatch(r"[^/\\\0]+", name) or name.startswith("."):
            raise UserError(f"runs.{name}: a run's name is a folder, so it holds no slash.")
    numbers: dict[str, Any] = {"seeds": comparison.seeds}
    if rates:
        numbers |= {"rates.values": rates.values, "rates.seeds": rates.seeds}
        numbers |= {f"rates.values_of.{name}": v for name, v in rates.values_of.items()}
    for key, values in numbers.items():
        if values is not None and (not values or len(set(values)) < len(values)):
            raise UserError(f"{key} must be different numbers, at least one, got {values}.")
    for key, count in (("workers", comparison.workers), ("threads", comparison.threads)):
        if count is not None and count < 1:
            raise UserError(f"{key} must be at least 1, got {count}.")
    if match and not 0 <= match.tolerance < 1:
        raise UserError(f"match.tolerance must lie in [0, 1), got {match.tolerance}.")
    budgets = (match.parameters, match.steps, match.seconds) if match else (1,)
    if not any(budgets):
        raise UserError("match needs one of parameters, steps and seconds, above zero.")


def _check_known(plan: Plan) -> None:
    """Check the names of runs that other keys speak of."""
    comparison = plan.comparison
    match, rates = comparison.match, comparison.rates
    named = {
        "rates.values_of": list(rates.values_of) if rates else [],
        "baseline": [comparison.baseline] if comparison.baseline else [],
        "baselines": [*comparison.baselines, *comparison.baselines.values()],
        "match.rank_of": list(match.rank_of) if match else [],
        "match.leave": list(match.leave) if match else [],
    }
    for key, names in named.items():
        for name in names:
            if name not in plan.trees:
                raise UserError(f"{key}: {name!r} is no run; {hint_at(name, plan.trees)}")
