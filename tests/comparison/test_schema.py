"""Names and numbers that cannot be are refused."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_peft.comparison.schema import Comparison, Match, Rates, check


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"seeds": []}, r"seeds must be different numbers, at least one, got \[\]."),
        ({"threads": 0}, "threads must be at least 1, got 0."),
        ({"match": Match(steps=1, tolerance=1.0)}, r"match.tolerance must lie in \[0, 1\)"),
        ({"rates": Rates([1.0], values_of={"a": [2.0, 2.0]})}, "rates.values_of.a must be diff"),
        ({"runs": {".a": {}}}, "runs..a: a run's name is a folder"),
        ({"runs": {3: {}}}, "runs: 3 is no name as it stands; write it in quotes"),
        ({"runs": {"a\n": {}}}, r"runs.'a\\n': a run's name is a folder and a cell of tables"),
        ({"runs": {"a" * 101: {}}}, "so it is at most 100 printable characters"),
        ({"folder": ""}, "folder: '' can be no folder"),
        ({"folder": "x" * 5000}, "folder: 'x+ …' can be no folder"),
        ({"grid": {"a": {3: [1]}}}, "grid.a: 3 is no name as it stands; write it in quotes"),
        ({"runs": {"a": ["b.yaml", {None: 1}]}}, "runs.a: None is no name as it stands"),
        ({"match": Match(steps=1, rank_of={True: "r"})}, "match.rank_of: True is no name"),  # type: ignore[dict-item]
        ({"runs": {" a": {}}}, "runs.' a': a run's name is a folder .* no blank at either end"),
        ({"also": None}, "also is null; give a value, or leave the key out"),
        ({"rates": Rates([1.0], values_of=None)}, "rates.values_of is null"),  # type: ignore[arg-type]
        ({"match": Match(steps=1, tolerance=None)}, "match.tolerance is null"),  # type: ignore[arg-type]
        ({"folder": __file__}, "folder: '.*test_schema.py' can be no folder"),
        ({"checkpoint": "../best.ckpt"}, "checkpoint: '../best.ckpt' is neither last nor a file"),
        ({"seeds": [-1]}, "seeds: -1 is no seed; those are 0 to 4294967295"),
        ({"seeds": [0, 1 << 32]}, "seeds: 4294967296 is no seed"),
        ({"rates": Rates([0.1], seeds=[-3])}, "rates.seeds: -3 is no seed"),
        ({"rates": Rates([float("nan")])}, "rates.values: nan is no number to try"),
        (
            {"rates": Rates([0.1, 0.1000000001])},
            r"\[0.1, 0.1000000001\] are not different in th",
        ),
        ({"match": Match(parameters=-5)}, "match.parameters must be a number above zero, got -5"),
        ({"match": Match(steps=5, seconds=float("nan"))}, "match.seconds must be a number above"),
        ({"match": Match(seconds=float("inf"))}, "match.seconds must be a number above zero, got"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        check(Comparison(**{"runs": {"a": {}}, "folder": "out", **changes}))


def test_what_can_be_is_let_through() -> None:
    check(Comparison({"a": {}}, "out", match=Match(seconds=1.0), rates=Rates([1.0], seeds=[1])))
