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
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        check(Comparison(**{"runs": {"a": {}}, "folder": "out", **changes}))


def test_what_can_be_is_let_through() -> None:
    check(Comparison({"a": {}}, "out", match=Match(seconds=1.0), rates=Rates([1.0], seeds=[1])))
