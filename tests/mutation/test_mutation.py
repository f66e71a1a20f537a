"""Damaged adapters and comparisons end in one sentence, or are read as they are."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from lightning_peft.settings.resolve import Resolver


def mutator(name: str) -> ModuleType:
    """A file of this folder, which is no package."""
    path = Path(__file__).with_name(f"{name}.py")
    spec = importlib.util.spec_from_file_location(f"mutation_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look up their annotations
    spec.loader.exec_module(module)
    return module


def check(module: ModuleType, outcomes: dict[str, str], least: int) -> None:
    """No traceback, no silence, and at most one sentence of a hundred that names no place."""
    odd = {k: v for k, v in outcomes.items() if v != "fine" and not v.startswith("sentence: ")}
    assert not odd, next(iter(odd.items()))
    said = [v for v in outcomes.values() if v != "fine"]
    lacking = [sentence for sentence in said if not module.names_its_place(sentence)]
    assert len(lacking) <= len(said) / 100, lacking[0]
    assert sum(v == "fine" for v in outcomes.values()) >= least


@pytest.mark.parametrize("seed", [0])
def test_a_damaged_adapter_is_refused_in_a_sentence_or_loaded_as_it_is(seed: int) -> None:
    module = mutator("adapters")
    outcomes = {f"{i} {m.what}": module.judge(m) for i, m in enumerate(module.mutants(seed, 120))}
    check(module, outcomes, 5)


@pytest.mark.long
def test_a_thousand_damaged_adapters_are_refused_or_loaded_as_they_are() -> None:
    module = mutator("adapters")
    outcomes = {f"{i} {m.what}": module.judge(m) for i, m in enumerate(module.mutants(2, 1000))}
    check(module, outcomes, 80)


@pytest.mark.parametrize("count", [8, pytest.param(150, marks=pytest.mark.long)])
def test_a_damaged_comparison_is_refused_in_a_sentence_or_planned_as_it_is(
    count: int, resolver: Resolver
) -> None:
    module = mutator("comparisons")
    found = list(module.mutants(0, count))
    outcomes = {f"{i} {m.what}": module.judge(m, resolver) for i, m in enumerate(found)}
    check(module, outcomes, 1)


@pytest.mark.parametrize("name", ["adapters", "comparisons"])
def test_mutants_are_the_same_for_a_seed(name: str) -> None:
    module: Any = mutator(name)
    first, second = (list(module.mutants(3, 20)) for _ in range(2))
    assert first == second
    assert first != list(module.mutants(4, 20))
