"""Training records of any schema become turns."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_peft.datamodules.code.records import HUMANEVAL, MBPP, TRAINING, python_turns

QUESTION, ANSWER = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}


@pytest.mark.parametrize(
    ("record", "turns"),
    [
        ({"query": "Q", "answer": "A"}, [("user", "Q"), ("assistant", "A")]),
        ({"instruction": "Q", "output": "A"}, [("user", "Q"), ("assistant", "A")]),
        (
            {"instruction": "Q", "input": "on 1", "output": "A"},
            [("user", "Q\non 1"), ("assistant", "A")],
        ),
        ({"messages": [QUESTION, ANSWER, QUESTION]}, [("user", "Q"), ("assistant", "A")]),
    ],
)
def test_turns_end_in_the_last_answer(record: dict[str, Any], turns: list[tuple[str, str]]) -> None:
    found, left_out = python_turns([record], "here")
    assert found == [(0, turns)]
    assert set(left_out.values()) == {0}


def test_other_languages_and_open_questions_are_counted() -> None:
    records = [
        {"query": "Q", "answer": "A", "lang": lang} for lang in ("c", "Python", "python3", "sql")
    ]
    found, left_out = python_turns(records, "here")
    assert [index for index, _ in found] == [1, 2]
    assert left_out == {"not_in_python": 2, "without_an_answer": 0}
    found, left_out = python_turns([{"messages": [QUESTION]}, {"messages": [ANSWER]}], "here")
    assert (found, left_out["without_an_answer"]) == ([], 2)


def test_unknown_and_mixed_schemas_are_refused() -> None:
    with pytest.raises(ValueError, match="The records of here have the columns a; wanted are q"):
        python_turns([{"a": 1}], "here")
    mixed = [{"query": "Q", "answer": "A"}, {"messages": [QUESTION, ANSWER]}]
    with pytest.raises(ValueError, match="have the columns answer, query beside messages"):
        python_turns(mixed, "here")
    with pytest.raises(ValueError, match="^Record 1 of here has messages without role and content"):
        python_turns([{"messages": [{"from": "user"}]}], "here")


def test_where_records_lie() -> None:
    assert set(TRAINING) == {"codefeedback", "codefeedback_chats", "evol_instruct_code"}
    assert HUMANEVAL.files == tuple(f"humaneval/*{end}" for end in (".jsonl", ".json", ".parquet"))
    assert (MBPP.required, MBPP.texts) == (("task_id", "test_list"), ("text",))
