"""What a comparison will run: every run's whole configuration, checked before anything starts."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_peft.comparison.budget import final_parameters, find_rank, trainer_limits
from lightning_peft.comparison.expand import expand, words_of
from lightning_peft.comparison.names import Names, names_of, resolve_names
from lightning_peft.comparison.schema import Comparison, Match, check, check_name
from lightning_peft.errors import UserError
from lightning_peft.settings.names import hint_at
from lightning_peft.settings.resolve import Resolver
from lightning_peft.settings.tree import assign, to_words


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
        parameters: By run, trainable parameters at the end, where a budget asked for them, as its
            strategy foretells them.
        notes: What is to be said of the runs before they begin, and beside their table.
    """

    comparison: Comparison
    trees: dict[str, dict[str, Any]]
    parameters: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def score(self) -> str:
        """What runs are judged by."""
        assert self.comparison.score is not None
        return self.comparison.score

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
        lines += [f"judged by {comparison.score}", *self.notes]
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
    check(comparison)
    resolver = resolver or Resolver()
    plan = Plan(comparison, _trees(comparison, folder, extra, resolver))
    _check_known(plan)
    names = _names(plan.trees, resolver)
    plan.comparison, plan.notes = resolve_names(comparison, names)
    match = comparison.match
    if match and match.parameters is not None:
        for run in (run for run in plan.trees if run not in match.leave):
            _match(plan, run, match, resolver)
    return plan


def _trees(
    comparison: Comparison, folder: Path, extra: Sequence[str], resolver: Resolver
) -> dict[str, dict[str, Any]]:
    """By run, its whole configuration."""
    limits = to_words(trainer_limits(comparison.match))
    base = words_of(list(comparison.base), folder, "base")
    shared = [*base, *limits, *to_words(comparison.overrides), *extra]
    trees: dict[str, dict[str, Any]] = {}
    for run, words in expand(comparison, folder).items():
        check_name(run)
        try:
            trees[run] = resolver.tree([*shared, *words])
            if comparison.rates and len(trees) == 1:  # a wrong key is better found now
                key, value = comparison.rates.key, comparison.rates.values[0]
                resolver.tree([*shared, *words, f"--{key}={value}"])
        except UserError as error:
            raise _in_run(run, error) from error
        assign(trees[run], "trainer.enable_progress_bar", False)
    return trees


def _names(trees: dict[str, dict[str, Any]], resolver: Resolver) -> dict[str, Names]:
    """By run, the metrics that it will have."""
    found: dict[str, Names] = {}
    made: dict[str, Names] = {}  # runs differ mostly by their adapters, which name no metric
    for run, tree in trees.items():
        given = tree["trainer"].get("callbacks") or []
        callbacks = [c["class_path"] for c in (given if isinstance(given, list) else [given])]
        key = json.dumps([tree["model"]["class_path"], tree.get("data"), callbacks], default=str)
        if key not in made:
            try:
                data = resolver.data(tree) if tree.get("data") else None
                made[key] = names_of(resolver.module(tree), data, callbacks)
            except UserError as error:
                raise _in_run(run, error) from error
        found[run] = made[key]
    return found


def _match(plan: Plan, run: str, match: Match, resolver: Resolver) -> None:
    """Choose a run's rank, and set it."""
    key = match.rank_of.get(run, match.rank)
    data = resolver.data(plan.trees[run]) if plan.trees[run].get("data") else None
    labels = len(getattr(data, "label_names", ("no", "yes")) or ("score",))

    def count(rank: int) -> int:
        tree = copy.deepcopy(plan.trees[run])
        assign(tree, key, rank)
        return final_parameters(resolver.module(tree), run, labels)

    try:
        rank, plan.parameters[run] = find_rank(run, match, count)
    except ValueError as error:  # also a plain one, by which a user's own method refuses a rank
        raise _in_run(run, error) from error
    assign(plan.trees[run], key, rank)


def _in_run(run: str, error: ValueError) -> UserError:
    text = str(error)
    return UserError(text if text.startswith("match.") else f"runs.{run}: {text}")


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
