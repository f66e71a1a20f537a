"""Gold answers of each task's records."""

from __future__ import annotations

import re
from typing import Any

import pytest

from lightning_peft.datamodules.math.records import TESTS, TRAINING, gold, with_marker


@pytest.mark.parametrize(
    ("task", "record", "answer"),
    [
        ("gsm8k", {"answer": "1+1=<<1+1=2>>2\n#### 1,082"}, "1082"),
        ("MATH", {"solution": r"So $\boxed{\frac{1}{2}}$."}, r"\frac{1}{2}"),
        ("SVAMP", {"answer": "12.0"}, "12.0"),
        ("SVAMP", {"answer": 12}, "12"),
        ("AQuA", {"answer": "E"}, "E"),
    ],
)
def test_gold_answers(task: str, record: dict[str, Any], answer: str) -> None:
    assert gold(task, record, 1) == answer


@pytest.mark.parametrize(
    ("task", "record", "message"),
    [
        ("gsm8k", {"answer": "It is 2."}, "Record 3 of gsm8k has an answer that does not end in"),
        (
            "gsm8k",
            {"answer": "#### two"},
            "Record 3 of gsm8k has the answer 'two', which is no number.",
        ),
        ("MATH", {"solution": "2"}, "Record 3 of MATH has no \\boxed answer in its solution."),
        ("SVAMP", {"answer": "x"}, "Record 3 of SVAMP has the answer 'x', which is no number."),
        ("AQuA", {"answer": "F"}, "Record 3 of AQuA has the answer 'F', which is no letter from A"),
    ],
)
def test_a_record_without_one_is_named(task: str, record: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        gold(task, record, 3)


def test_answers_to_train_on_end_as_metamathqas() -> None:
    answer = "16-3=<<16-3=13>>13\n#### 1,013"
    assert with_marker(answer) == f"{answer}\nThe answer is: 1013"


def test_where_records_lie() -> None:
    assert TRAINING["gsm8k"].files[0] == "gsm8k/train*.jsonl"
    assert (TRAINING["metamathqa"].hub, TRAINING["metamathqa"].split) == (
        "meta-math/MetaMathQA",
        "train",
    )
    assert (TESTS["gsm8k"].config, TESTS["gsm8k"].split) == ("main", "test")
    assert [task for task, source in TESTS.items() if not source.hub] == ["SVAMP", "AQuA"]
