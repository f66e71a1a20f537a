"""Where a text belongs anything else is refused: in every task, with file, record and field."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from lightning_peft.datamodules import Example, Protocol, Source, TextDataModule
from lightning_peft.datamodules.code.module import CodeDataModule
from lightning_peft.datamodules.commonsense import CommonsenseDataModule
from lightning_peft.datamodules.conversation.module import ConversationDataModule
from lightning_peft.datamodules.dart import DartDataModule
from lightning_peft.datamodules.dialogsum import DialogSumDataModule
from lightning_peft.datamodules.glue.module import GlueDataModule
from lightning_peft.datamodules.instruction.module import InstructionDataModule
from lightning_peft.datamodules.math.module import MathDataModule
from lightning_peft.errors import UserError

Record = dict[str, Any]
WRONG: dict[str, Any] = {
    "the number 5": 5,
    "the number 1.5": 1.5,
    "true": True,
    "a list": ["a"],
    "an object": {"a": 1},
}
TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
SAYS = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]


def own(folder: Path) -> Any:
    return InstructionDataModule(str(folder / "train.jsonl"))


def trained(data: Any) -> Any:
    return data.train_examples()


def asked(data: Any) -> Any:
    return data.test_examples()


# Of each task: its file, a good record, its fields of texts, how its data module is made and read.
CASES: dict[str, tuple[str, Record, Sequence[str], Callable[[Path], Any], Callable[[Any], Any]]] = {
    "own instructions": (
        "train.jsonl",
        {"instruction": "a", "input": "b", "output": "c"},
        ("instruction", "input", "output"),
        own,
        trained,
    ),
    "own prompts": (
        "train.jsonl",
        {"prompt": "a", "completion": "b"},
        ("prompt", "completion"),
        own,
        trained,
    ),
    "own texts": ("train.jsonl", {"text": "a"}, ("text",), own, trained),
    "own messages": ("train.jsonl", {"messages": TURNS}, ("messages.0.content",), own, trained),
    "own conversations": (
        "train.jsonl",
        {"conversations": SAYS},
        ("conversations.1.value",),
        own,
        trained,
    ),
    "conversation": (
        "train.json",
        {"conversations": SAYS},
        ("conversations.0.value",),
        lambda folder: ConversationDataModule(str(folder)),
        trained,
    ),
    "commonsense, trained": (
        "boolq/train.json",
        {"instruction": "a", "input": "", "output": "the correct answer is true"},
        ("instruction", "input", "output"),
        lambda folder: CommonsenseDataModule(str(folder)),
        trained,
    ),
    "commonsense, tested": (
        "boolq/test.json",
        {"instruction": "a", "output": "b", "answer": "true"},
        ("instruction", "output", "answer"),
        lambda folder: CommonsenseDataModule(str(folder)),
        asked,
    ),
    "metamathqa": (
        "metamathqa/a.json",
        {"query": "a", "response": "b", "type": "c"},
        ("query", "response", "type"),
        lambda folder: MathDataModule(str(folder)),
        trained,
    ),
    "gsm8k": (
        "gsm8k/train.jsonl",
        {"question": "a", "answer": "#### 1"},
        ("question", "answer"),
        lambda folder: MathDataModule(str(folder), train_on="gsm8k"),
        trained,
    ),
    "MATH": (
        "MATH/test.jsonl",
        {"problem": "a", "solution": "\\boxed{1}"},
        ("problem", "solution"),
        lambda folder: MathDataModule(str(folder)),
        asked,
    ),
    "SVAMP": (
        "SVAMP/test.json",
        {"instruction": "a", "answer": "1.0"},
        ("instruction",),
        lambda folder: MathDataModule(str(folder), "llm_adapters"),
        asked,
    ),
    "codefeedback": (
        "codefeedback/filtered.jsonl",
        {"query": "a", "answer": "b", "lang": "python"},
        ("query", "answer", "lang"),
        lambda folder: CodeDataModule(str(folder)),
        trained,
    ),
    "code chats": (
        "codefeedback/code_feedback.jsonl",
        {"messages": TURNS},
        ("messages.0.content",),
        lambda folder: CodeDataModule(str(folder), train_on="codefeedback_chats"),
        trained,
    ),
    "evol instruct code": (
        "evol_instruct_code/train.json",
        {"instruction": "a", "input": "b", "output": "c"},
        ("instruction", "input", "output"),
        lambda folder: CodeDataModule(str(folder), train_on="evol_instruct_code"),
        trained,
    ),
    "humaneval": (
        "humaneval/a.jsonl",
        {"task_id": "a", "prompt": "b", "entry_point": "c", "test": "d"},
        ("task_id", "prompt", "entry_point", "test"),
        lambda folder: CodeDataModule(str(folder)),
        lambda data: data._problems("humaneval"),
    ),
    "mbpp": (
        "mbpp/a.jsonl",
        {"task_id": 11, "text": "b", "test_list": ["c"], "test_setup_code": ""},
        ("text", "test_list.0", "test_setup_code"),
        lambda folder: CodeDataModule(str(folder)),
        lambda data: data._problems("mbpp"),
    ),
    "dialogsum": (
        "train.jsonl",
        {"dialogue": "a", "summary": "b", "summary2": "c"},
        ("dialogue", "summary", "summary2"),
        lambda folder: DialogSumDataModule(str(folder), val_size=0),
        trained,
    ),
    "dart": (
        "train.json",
        {"tripleset": [["a", "b", "c"]], "annotations": [{"text": "d"}]},
        ("tripleset.0.1", "annotations.0.text"),
        lambda folder: DartDataModule(str(folder), val_size=0),
        trained,
    ),
    "glue": (
        "train.jsonl",
        {"sentence1": "a", "sentence2": "b", "label": 0},
        ("sentence1", "sentence2"),
        lambda folder: GlueDataModule("rte", str(folder)),
        lambda data: data.train_records(),
    ),
}


def changed(record: Record, path: str, value: Any) -> Record:
    """A copy in which what a path leads to is another value."""
    copy: Any = json.loads(json.dumps(record))
    *way, last = (int(step) if step.isdigit() else step for step in path.split("."))
    place = copy
    for step in way:
        place = place[step]
    place[last] = value
    return copy


@pytest.mark.parametrize("name", CASES)
def test_what_is_no_text_is_named(name: str, tmp_path: Path, write_records: Any) -> None:
    file, good, fields, build, read = CASES[name]
    path = write_records(tmp_path / file, [good, good])
    assert len(read(build(tmp_path))) >= 1
    for field in fields:
        for found, value in WRONG.items():
            write_records(path, [good, changed(good, field, value)])
            with pytest.raises(UserError) as error:
                read(build(tmp_path))
            sentence, last = str(error.value), field.rpartition(".")[2]
            named = field.split(".")[-2] if last.isdigit() or "tripleset" in field else last
            named = "tripleset" if "tripleset" in field else named
            assert "ecord 2 of " in sentence
            assert f"no text in {named!r} but {found}; " in sentence
            assert "\n" not in sentence


@pytest.mark.parametrize("value", [None, 5, "a", [5], [None], {"a": 1}, [[5]], True])
@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("dart", "tripleset"),
        ("dart", "annotations"),
        ("mbpp", "test_list"),
        ("mbpp", "task_id"),
        ("own messages", "messages"),
        ("conversation", "conversations"),
        ("code chats", "messages"),
    ],
)
def test_what_is_no_list_of_what_is_wanted_is_named(
    name: str, field: str, value: Any, tmp_path: Path, write_records: Any
) -> None:
    file, good, _, build, read = CASES[name]
    if (field, value) == ("task_id", 5):
        return  # a number of a problem that no test takes
    write_records(tmp_path / file, [good, changed(good, field, value)])
    with pytest.raises(UserError, match=r"^(Record 2 of |The records of )"):
        read(build(tmp_path))


# One's own tasks ----------------------------------------------------------------------------------


class Plain(TextDataModule):
    """Reads its file without saying what has to be a text."""

    protocols = {"p": Protocol("p", "{instruction}", "response", 64, 8)}

    def __init__(self, data_dir: str, **kwargs: Any) -> None:
        super().__init__(data_dir, "p", val_size=0, **kwargs)

    def train_examples(self) -> Sequence[Example]:
        records = Source(("own.jsonl",), "o/n", "train").read(self.data_dir)
        return [self.example(r["q"], r["a"], "own", i) for i, r in enumerate(records)]

    def test_examples(self) -> Mapping[str, Sequence[Example]]:
        return {"own": [Example(e.response, "", "own", e.index) for e in self.train_examples()]}


@pytest.mark.parametrize(
    ("record", "sentence"),
    [
        (
            {"q": 5, "a": "b"},
            "Record 2 of own has no text in 'instruction' but the number 5; write",
        ),
        (
            {"q": "a", "a": 5},
            "Record 2 of own has no text in 'response' but the number 5; write it",
        ),
        ({"q": "a", "a": None}, "Record 2 of own has no text in 'response'; give one."),
    ],
)
def test_in_ones_own_task_the_record_is_named(
    record: Record, sentence: str, build_data: Any, tmp_path: Path, write_records: Any
) -> None:
    write_records(tmp_path / "own.jsonl", [{"q": "a", "a": "b"}, record])
    with pytest.raises(UserError) as error:
        build_data(Plain, str(tmp_path), stage="fit")
    assert str(error.value).startswith(sentence)


def test_a_prompt_that_is_no_text_is_named(
    build_data: Any, tmp_path: Path, write_records: Any
) -> None:
    write_records(tmp_path / "own.jsonl", [{"q": "a", "a": ["b"]}])
    with pytest.raises(
        UserError, match="^Record 1 of own has no text in 'prompt' but a list; give"
    ):
        build_data(Plain, str(tmp_path), stage="test")
