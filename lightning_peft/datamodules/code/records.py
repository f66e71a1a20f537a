"""Where records of code lie, and the schemas that those to train on come in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_peft.datamodules.loading.fields import (
    described,
    listed,
    text_if_any,
    text_in,
    texts_in,
)
from lightning_peft.datamodules.loading.files import Records
from lightning_peft.datamodules.loading.records import Source
from lightning_peft.errors import UserError

Turn = tuple[str, str]  # role and text

_ENDS = (".jsonl", ".json", ".parquet")


def _files(*stems: str) -> tuple[str, ...]:
    return tuple(f"{stem}{end}" for stem in stems for end in _ENDS)


TRAINING = {
    "codefeedback": Source(
        _files("codefeedback/*iltered*", "codefeedback/*"),
        "m-a-p/CodeFeedback-Filtered-Instruction",
        "train",
    ),
    "codefeedback_chats": Source(
        _files("codefeedback/[Cc]ode[-_][Ff]eedback*"), "m-a-p/Code-Feedback", "train"
    ),
    "evol_instruct_code": Source(
        _files("evol_instruct_code/*"), "nickrosh/Evol-Instruct-Code-80k-v1", "train"
    ),
}
HUMANEVAL = Source(
    _files("humaneval/*"),
    "openai/openai_humaneval",
    "test",
    texts=("task_id", "prompt", "entry_point", "test"),
)
MBPP = Source(
    _files("mbpp/*"),
    "google-research-datasets/mbpp",
    "train+test+validation+prompt",
    "full",
    required=("task_id", "test_list"),
    texts=("text",),
)
MOST_KINDS = 4  # of records, that a sentence lists
SCHEMAS = (("query", "answer"), ("messages",), ("instruction", "output"))


def python_turns(
    records: Records, place: str
) -> tuple[list[tuple[int, list[Turn]]], dict[str, int]]:
    """Bring records of any schema into turns.

    Args:
        records: All of one schema.
        place: Where they are from, for messages.

    Returns:
        Each record's index and turns, the last an assistant's; and by reason how many were left
        out: in another language than Python, or without an answer.

    Raises:
        UserError: If the columns are those of no schema, or of several.
    """
    schema = _schema(records, place)
    places = [f"Record {number} of {place}" for number in range(1, len(records) + 1)]
    python = [(i, r) for i, r in enumerate(records) if _is_python(r, places[i])]
    turns = [(i, _turns(schema, r, places[i])) for i, r in python]
    answered = [(i, t) for i, t in turns if t]
    left_out = {
        "not_in_python": len(records) - len(python),
        "without_an_answer": len(python) - len(answered),
    }
    return answered, left_out


def _schema(records: Records, place: str) -> tuple[str, ...]:
    """Tell the schema of all records by the columns that they hold something in."""
    kinds = {frozenset(key for key, value in r.items() if value is not None) for r in records}
    found = {next((s for s in SCHEMAS if kind.issuperset(s)), None) for kind in kinds}
    schema = found.pop()
    if found or schema is None:
        names = sorted(listed(sorted(kind)) or "none" for kind in kinds)
        columns = " beside ".join(names[:MOST_KINDS] + ["…"] * (len(names) > MOST_KINDS))
        raise UserError(
            f"The records of {place} have the columns {columns}; wanted are query and answer, "
            "or messages, or instruction and output, the same in all of them."
        )
    return schema


def mbpp_problem(record: Mapping[str, Any], place: str) -> Mapping[str, Any]:
    """Return a problem of MBPP, or refuse it where it has no number, or tests that are no texts."""
    if not isinstance(record["task_id"], int) or isinstance(record["task_id"], bool):
        raise UserError(
            f"{place} has no whole number in 'task_id' but {described(record['task_id'])}; the "
            "tests choose by it."
        )
    if not texts_in(record["test_list"], "test_list", place):
        raise UserError(f"{place} has no test in 'test_list'; give one.")
    text_if_any(record, "test_setup_code", place)
    return record


def _is_python(record: Mapping[str, Any], place: str) -> bool:
    language = text_if_any(record, "lang", place)
    return language is None or language.lower() in ("python", "python3", "py")


def _turns(schema: tuple[str, ...], record: Mapping[str, Any], place: str) -> list[Turn]:
    """Return the turns up to the last answer; none where there is no answer to a question."""
    if schema != ("messages",):
        question, answer = (text_in(record, column, place) for column in schema)
        if schema[0] == "instruction" and (added := text_if_any(record, "input", place)):
            question = f"{question}\n{added}"
        return [("user", question), ("assistant", answer)] if answer else []
    try:
        turns = [(m["role"], m["content"]) for m in record["messages"]]
    except (KeyError, TypeError) as error:
        raise UserError(f"{place} has messages without role and content.") from error
    turns = [(role, text) for role, text in turns if role in ("system", "user", "assistant")]
    for _, text in turns:
        text_in({"content": text}, "content", f"{place}, in a message,")
    while turns and turns[-1][0] != "assistant":
        turns.pop()
    return turns if turns and turns[0][0] != "assistant" else []
