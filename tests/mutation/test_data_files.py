"""A damaged file of data is read as it stands or refused in one sentence, in every task."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from data_files import Mutant, good, judge, mutants, names_its_place, written  # noqa: E402
from data_tasks import TASKS  # noqa: E402


@pytest.mark.parametrize("task", sorted(TASKS))
def test_a_good_file_is_fine(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    content = written(TASKS[task].kind, good(task))
    assert judge(Mutant("nothing", task, content)) == "fine"
    content = written(TASKS[task].kind, TASKS[task].ours)
    assert judge(Mutant("nothing", task, content)) == "fine"


def test_damaged_files_are_read_as_they_stand_or_refused_in_one_sentence() -> None:
    said = [(mutant.what, judge(mutant)) for mutant in mutants(0, 100)]
    refused = [text for _, text in said if text.startswith("sentence")]
    assert [pair for pair in said if not pair[1].startswith(("fine", "sentence"))] == []
    assert [text for text in refused if not names_its_place(text)] == []
    assert 20 < len(refused) < 90


def test_mutants_are_the_same_for_a_seed() -> None:
    assert list(mutants(3, 20)) == list(mutants(3, 20)) != list(mutants(4, 20))


@pytest.mark.parametrize(
    ("task", "change"),
    [
        ("own csv", ("502.50", "502.5")),
        ("e2e", ("\n", "\n,\n")),
        ("rte", ("\tentailment", "\tnot_entailment")),
    ],
)
def test_what_is_read_otherwise_than_by_hand_is_wrong(
    task: str, change: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = written(TASKS[task].kind, TASKS[task].ours)
    other = content.decode().replace(*change).encode()
    monkeypatch.setattr("data_files.by_hand", lambda kind, _: TASKS[task].ours)
    said = judge(Mutant("by hand", task, other))
    assert said.startswith(("wrong: ", "sentence: "))
