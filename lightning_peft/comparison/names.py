"""What runs will have to be judged by, known before they run: the names of their metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from lightning_peft.comparison.schema import Comparison
from lightning_peft.errors import UserError
from lightning_peft.modules.answering import AnsweringModule
from lightning_peft.modules.causal_lm import CausalLMModule
from lightning_peft.modules.classification import SequenceClassificationModule

# What an adapted module logs at every step; the last four go to metrics.csv alone.
_STEP = ("train_loss", "rank", "tokens_per_second")
_CSV = ("grad_norm", "lr", "epoch", "step")
# Callbacks that log nothing.
_SILENT = ("ModelCheckpoint", "EarlyStopping", "Timer", "ModelSummary", "RichModelSummary")


@dataclass(frozen=True)
class Names:
    """The metrics of one run, the one to judge by first; None where only the run will tell.

    Attributes:
        data: The class of its data module.
        test: Of its test.
        fit: Of its validation and training, as ``run.json`` holds them.
        first: What its test is judged by where nothing is said; None where that is not known.
    """

    data: str
    test: tuple[str, ...] | None
    fit: tuple[str, ...] | None
    first: str | None

    @property
    def logged(self) -> tuple[str, ...] | None:
        """Of ``metrics.csv``."""
        return None if self.fit is None else (*self.fit, *_CSV)

    @property
    def all(self) -> tuple[str, ...] | None:
        """Of ``run.json`` after a test."""
        return None if self.test is None or self.fit is None else (*self.test, *self.fit)


def names_of(module: Any, data: Any, callbacks: Iterable[str] = ()) -> Names:
    """The metrics of a run.

    Args:
        module: Its module, without a model.
        data: Its data module, without data.
        callbacks: Paths of its classes of callbacks, any of which may log what it likes.
    """
    silent = ("lightning.", "pytorch_lightning.")
    speak = [c for c in callbacks if not (c.startswith(silent) and c.endswith(_SILENT))]
    test, first = _of_test(module, data)
    fit = _of_validation(module, data)
    fit = None if fit is None or speak else (*fit, *_STEP)
    return Names(type(data).__name__, None if speak else test, fit, first)


def _of_test(module: Any, data: Any) -> tuple[tuple[str, ...] | None, str | None]:
    """Names of a test's metrics, and the first of them, each None where it is not known."""
    if not isinstance(module, AnsweringModule) or not hasattr(data, "score"):
        return None, None
    known = hasattr(data, "score_names") and not _newer(data, "score", "score_names")
    tasks = list(getattr(data, "test_tasks", ()))
    scores = {task: dict.fromkeys(data.score_names(task), 0.0) for task in tasks if known}
    named = tuple(f"test/{name}" for name in module.named_scores(scores))
    if not known or not tasks:
        # The average over tasks is there whatever they are.
        some = module.named_scores({"task": {"metric": 0.0}})
        return None, "test/average" if "average" in some else None
    return named, "test/average" if "test/average" in named else next(iter(named), None)


def _of_validation(module: Any, data: Any) -> tuple[str, ...] | None:
    if isinstance(module, CausalLMModule):
        is_ours = type(module).validation_step is CausalLMModule.validation_step
        return ("val_accuracy", "val_loss") if is_ours else None
    ours = SequenceClassificationModule
    if not isinstance(module, ours) or not hasattr(data, "metric_names"):
        return None
    if type(module).on_validation_epoch_end is not ours.on_validation_epoch_end:
        return None
    metrics = [f"val_{name}" for name in data.metric_names]
    # Records that are split off the training set are one set.
    several = len(data.test_tasks) > 1 and not getattr(data, "val_size", 0)
    sets = data.test_tasks if several else ()
    by_set = [f"{metric}_{name}" for name in sets for metric in metrics]
    return ("val_score", "val_loss", *metrics, *by_set)


def _newer(instance: Any, method: str, other: str) -> bool:
    """Whether a class overrides one method below where another one stands."""
    classes = type(instance).__mro__
    places = [next(i for i, c in enumerate(classes) if n in vars(c)) for n in (method, other)]
    return places[0] < places[1]


def resolve_names(
    comparison: Comparison, found: Mapping[str, Names]
) -> tuple[Comparison, list[str]]:
    """Say what runs are judged by where nothing is said, and refuse names that no run will have.

    Args:
        comparison: As given.
        found: The metrics of each run.

    Returns:
        The comparison with all names set, and what is to be said of runs that lack one.

    Raises:
        UserError: Naming the key, what was given, and what there is.
    """
    resolved = replace(comparison)
    if resolved.score is None:
        resolved.score = _common("score", found, lambda names: names.first or _first(names))
    if resolved.curve is None:
        resolved.curve = _common("curve", found, _first, "val_loss")
    keys: dict[str, tuple[str, Callable[[Names], tuple[str, ...] | None]]] = {
        "score": (resolved.score, lambda names: names.all),
        **{f"also[{i}]": (name, lambda n: n.all) for i, name in enumerate(resolved.also)},
        "curve": (resolved.curve, lambda names: names.logged),
    }
    if resolved.rates is not None:
        resolved.rates = replace(resolved.rates)
        if resolved.rates.choose_by is None:
            resolved.rates.choose_by = _common("rates.choose_by", found, _first)
        keys["rates.choose_by"] = (resolved.rates.choose_by, lambda names: names.fit)
    notes = [_check(key, name, found, which) for key, (name, which) in keys.items()]
    return resolved, [note for note in notes if note]


def _first(names: Names) -> str | None:
    """What a run is validated by where nothing is said."""
    return next(iter(names.fit), None) if names.fit else None


def _common(
    key: str,
    found: Mapping[str, Names],
    choose: Callable[[Names], str | None],
    otherwise: str | None = None,
) -> str:
    """The name that is every run's own choice."""
    chosen = {run: choose(names) for run, names in found.items()}
    known = list(dict.fromkeys(chosen.values()))
    if len(known) == 1 and known[0] is not None:
        return known[0]
    if otherwise is not None:
        return otherwise
    if None in known:
        run = next(run for run, name in chosen.items() if name is None)
        raise UserError(
            f"{key}: what {run} will log on {found[run].data} is not known before it runs; give "
            f"{key}."
        )
    others = [next(run for run, name in chosen.items() if name == value) for value in known[:2]]
    said = " and ".join(f"{run} ({found[run].data}) by {chosen[run]}" for run in others)
    raise UserError(
        f"{key}: the runs have no common one, since their data differ ({said}); give {key}."
    )


def _check(
    key: str,
    name: str,
    found: Mapping[str, Names],
    which: Callable[[Names], tuple[str, ...] | None],
) -> str:
    """Refuse a name that no run will have; say so where some will not."""
    names = {run: which(n) for run, n in found.items()}
    without = [run for run, there in names.items() if there is not None and name not in there]
    if not without:
        return ""
    if len(without) == len(names):
        there = [n for found_names in names.values() for n in found_names or ()]
        raise UserError(f"{key}: no run will have {name!r}; there are {_listed(there)}.")
    if key == "rates.choose_by":
        raise UserError(
            f"{key}: {without[0]} ({found[without[0]].data}) will have no {name!r} to choose by; "
            f"there are {_listed(names[without[0]] or ())}."
        )
    return f"{key}: {name} is not a metric of {', '.join(without)}."


def _listed(names: Iterable[str]) -> str:
    found = sorted(set(names))
    return ", ".join(found[:30]) + (f" and {len(found) - 30} more" if len(found) > 30 else "")
