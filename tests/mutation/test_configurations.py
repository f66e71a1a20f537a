"""Whatever is wrong in a configuration is said in one sentence that names a key or the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from configurations import FINE, SENTENCE, judge, mutants, says_where

from lightning_peft.settings.resolve import Resolver


def check(seed: int, count: int, folder: Path, resolver: Resolver) -> None:
    nowhere = []
    for mutant in mutants(seed, count):
        verdict = judge(mutant, folder, resolver)
        assert verdict.kind in (FINE, SENTENCE), f"{mutant.name}\n{verdict.text}"
        assert "\n" not in verdict.text
        assert str(Path("/tmp/tmp")) not in verdict.text.replace(str(folder), "")
        if verdict.kind == SENTENCE and not says_where(mutant, verdict.text):
            nowhere.append((mutant.name, verdict.text))
    assert len(nowhere) <= count / 100, nowhere


def test_some_mutants(tmp_path: Path, resolver: Resolver) -> None:
    check(0, 30, tmp_path, resolver)


@pytest.mark.long
@pytest.mark.parametrize("seed", [1, 2])
def test_many_mutants(seed: int, tmp_path: Path, resolver: Resolver) -> None:
    check(seed, 300, tmp_path, resolver)


def test_mutants_of_one_seed_are_the_same() -> None:
    first, second, other = (list(mutants(seed, 20)) for seed in (0, 0, 1))
    assert first == second
    assert first != other


def test_a_bug_is_no_sentence(tmp_path: Path) -> None:
    class Broken:
        def tree(self, words: list[str]) -> Any:
            raise TypeError("a bug")

        module = tree

    (mutant,) = mutants(0, 1)
    verdict = judge(mutant, tmp_path, Broken())
    assert verdict.kind == "traceback"
    assert "a bug" in verdict.text
