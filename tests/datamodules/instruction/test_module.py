"""One's own data: the forms, templates, chat templates, and every sentence about what is wrong."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_peft.datamodules.instruction.module import InstructionDataModule
from lightning_peft.models.generation import generate

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{}\n\n### Response:\n"
).format
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{}\n\n### Input:\n{}\n\n### Response:\n"
).format
CHAT = [
    {"role": "system", "content": "Be é."},
    {"role": "user", "content": "Hi {input}"},
    {"role": "assistant", "content": "Ho"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "So\nlong"},
]
SHAREGPT = [
    {"from": {"user": "human", "assistant": "gpt"}.get(m["role"], "system"), "value": m["content"]}
    for m in CHAT
]


def write(path: Path, *records: dict[str, Any]) -> str:
    """Write records in the format of the file's name."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    elif path.suffix == ".json":
        path.write_text(json.dumps(records))
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([records[0], *(r.values() for r in records)])
    else:
        Dataset.from_list(list(records)).to_parquet(path)
    return str(path)


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(
        "lightning_peft.datamodules.instruction.module.rank_zero_info", lines.append
    )
    return lines


@pytest.fixture
def build(build_data: Any) -> Any:
    def build_module(
        data_dir: Path | str, stage: str | None = "fit", **kwargs: Any
    ) -> InstructionDataModule:
        options = {"group_by_length": False, **kwargs}
        return build_data(InstructionDataModule, data_dir, stage=stage, **options)

    return build_module


FORMS = {
    "instruction": (
        {"instruction": "Add {input}", "output": "Yés"},
        [(ALPACA("Add {input}"), "Yés")],
    ),
    "instruction with input": (
        {"instruction": "Add", "input": "1 {instruction}", "output": "2"},
        [(ALPACA_WITH_INPUT("Add", "1 {instruction}"), "2")],
    ),
    "instruction with an empty input": (
        {"instruction": "Add", "input": "", "output": "2"},
        [(ALPACA("Add"), "2")],
    ),
    "messages": (
        {"messages": CHAT},
        [(ALPACA("Be é.\n\nHi {input}"), "Ho"), (ALPACA("Bye"), "So\nlong")],
    ),
    "conversations": (
        {"conversations": SHAREGPT},
        [(ALPACA("Be é.\n\nHi {input}"), "Ho"), (ALPACA("Bye"), "So\nlong")],
    ),
    "prompt": ({"prompt": "Q {instruction}: ", "completion": "A"}, [("Q {instruction}: ", "A")]),
    "text": ({"text": "All of it."}, [("", "All of it.")]),
    # With several forms at once, the first of the list holds.
    "instruction and text": (
        {"text": "x", "instruction": "Add", "output": "2"},
        [(ALPACA("Add"), "2")],
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_each_form_token_for_token(
    name: str,
    build: Any,
    byte_ids: Any,
    tmp_path: Path,
    said: list[str],
    only_row: Any,
    joined_row: Any,
) -> None:
    record, pairs = FORMS[name]
    path = write(tmp_path / "own.jsonl", record)
    pieces = [
        piece
        for prompt, response in pairs
        for piece in ((byte_ids(prompt), False), ([*byte_ids(response), 2], True))
    ]
    assert only_row(build(path)) == joined_row(pieces)
    assert said == [f"data: 1 records in the {name.split()[0]} form ({path})"]


@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "parquet"])
def test_files_of_each_kind(
    kind: str,
    build: Any,
    byte_ids: Any,
    tmp_path: Path,
    said: list[str],
    only_row: Any,
    joined_row: Any,
) -> None:
    path = write(tmp_path / f"train.{kind}", {"instruction": "Add", "output": "2"})
    expected = joined_row([(byte_ids(ALPACA("Add")), False), ([*byte_ids("2"), 2], True)])
    assert only_row(build(path)) == expected
    assert only_row(build(tmp_path)) == expected  # the folder
    assert said == [f"data: 1 records in the instruction form ({path})"] * 2


def test_a_hub_name_is_read(
    build: Any, monkeypatch: pytest.MonkeyPatch, byte_ids: Any, only_row: Any
) -> None:
    def from_hub(source: Any, cache_dir: str | None) -> list[dict[str, Any]]:
        assert (source.hub, source.split) == ("some/data", "train")
        return [{"prompt": "Q", "completion": "A"}]

    monkeypatch.setattr("lightning_peft.datamodules.loading.records._from_hub", from_hub)
    ids, _ = only_row(build("some/data"))
    assert ids == [*byte_ids("QA"), 2]


def test_splits_of_a_folder(build: Any, tmp_path: Path) -> None:
    for name in ("train", "validation", "test-0", "test-1"):
        write(tmp_path / f"{name}.jsonl", {"instruction": f"{name}?", "output": name})
    data = build(tmp_path, stage=None, val_split="validation", test_split="test")
    assert [e.response for e in data.train_examples()] == ["train"]
    assert [e.response for e in data.val_examples()] == ["validation"]
    assert [e.expected for e in data.test_examples()["test"]] == ["test-0", "test-1"]
    data = build(tmp_path, train_split="validation")
    assert [e.response for e in data.train_examples()] == ["validation"]


def test_a_file_has_no_splits(build: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "own.jsonl", GOOD)
    with pytest.raises(ValueError, match=r"own.jsonl' is a file, which has no split 'test'; name "):
        build(path, "test", test_split="test")


def test_splits_and_configuration_of_the_hub(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def from_hub(source: Any, cache_dir: str | None) -> list[dict[str, Any]]:
        asked.append((source.hub, source.config, source.split))
        return [{"instruction": "a", "output": "b"}]

    monkeypatch.setattr("lightning_peft.datamodules.loading.records._from_hub", from_hub)
    splits = {"train_split": "train[:50]", "val_split": "dev", "test_split": "test[10:]"}
    data = build("some/data", subset="main", **splits)
    data.setup("test")
    assert asked == [("some/data", "main", split) for split in splits.values()]
    assert data.test_tasks == ["test_10"]


def test_columns_are_mapped(
    build: Any, byte_ids: Any, tmp_path: Path, only_row: Any, joined_row: Any
) -> None:
    record = {"question": "Add", "context": "1", "answer": "2", "text": "none"}
    columns = {"instruction": "question", "input": "context", "output": "answer"}
    data = build(write(tmp_path / "own.json", record), columns=columns)
    pieces = [(byte_ids(ALPACA_WITH_INPUT("Add", "1")), False), ([*byte_ids("2"), 2], True)]
    assert only_row(data) == joined_row(pieces)


@pytest.mark.parametrize(
    ("template", "prompt"),
    [
        ("Q: {instruction}\nA: ", "Q: Add {input}\n1\nA: "),
        ("Q: {instruction} ({input})\nA: ", "Q: Add {input} (1)\nA: "),
    ],
)
def test_ones_own_template(
    template: str,
    prompt: str,
    build: Any,
    byte_ids: Any,
    tmp_path: Path,
    only_row: Any,
    joined_row: Any,
) -> None:
    path = write(tmp_path / "a.json", {"instruction": "Add {input}", "input": "1", "output": "2"})
    data = build(path, template=template)
    pieces = [(byte_ids(prompt), False), ([*byte_ids("2"), 2], True)]
    assert only_row(data) == joined_row(pieces)
    assert (data.protocol.name, data.protocol.template) == ("own template", template)


@pytest.mark.parametrize("by_template", [False, True])
def test_a_test_prompt_is_what_stands_before_the_last_answer_in_training(
    by_template: bool, build: Any, chatml: Any, tmp_path: Path, only_row: Any
) -> None:
    path = write(tmp_path / "own.jsonl", {"messages": CHAT})
    data = build(path, None, tokenizer=chatml, chat_template=by_template, test_file=path)
    ids, labels = only_row(data)
    last = len(labels) - 1
    while labels[last] >= 0:
        last -= 1
    batch = next(iter(data.test_dataloader()[0]))
    assert batch["input_ids"][0].tolist() == ids[: last + 1]
    assert (batch["expected"], batch["task"]) == (["So\nlong"], "own")


def test_generation_stops_at_the_end_that_the_chat_template_writes(
    build: Any, chatml: Any, tmp_path: Path
) -> None:
    path = write(tmp_path / "own.jsonl", {"messages": CHAT})
    data = build(path, "test", tokenizer=chatml, chat_template=True, test_file=path)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(chatml), **sizes, **heads)).eval()
    script = chatml("ok<|im_end|>never", add_special_tokens=False)["input_ids"]

    def forced(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        position = calls.pop(0)
        output.logits[:, -1] = -1e9
        output.logits[:, -1, script[position]] = 0.0
        return output

    calls = list(range(len(script)))
    model.register_forward_hook(forced, with_kwargs=True)
    batch = next(iter(data.test_dataloader()[0]))
    assert generate(model, batch, data.decoding("own"), data.encoder) == ["ok"]
    assert len(calls) == len("never")


def test_scores_compare_whole_answers(build: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "own.jsonl", {"instruction": "Add", "output": "a b c"})
    data = build(path, "test", test_file=path)
    rows = [{"output": text, "expected": "a b c"} for text in (" a b c\n", "a c")]
    data.judge("own", rows)
    assert [row["correct"] for row in rows] == [True, False]
    scores = data.score("own", rows)
    assert scores == {"accuracy": 0.5, "rougeL": pytest.approx((1 + 0.8) / 2)}
    assert list(scores) == ["accuracy", "rougeL"]


def test_validation_is_by_file_or_by_size(build: Any, tmp_path: Path) -> None:
    records = [{"instruction": str(i), "output": "x"} for i in range(10)]
    path = write(tmp_path / "own.jsonl", *records)
    other = write(tmp_path / "val.csv", *records[:3])
    assert (build(path).counts["train"], build(path).counts["val"]) == (10, 0)
    assert build(path, val_size=4).counts["train"] == 6
    data = build(path, val_file=other)
    assert (data.counts["train"], data.counts["val"]) == (10, 3)


GOOD = {"instruction": "a", "output": "b"}


@pytest.mark.parametrize(
    ("records", "arguments", "message"),
    [
        (
            [{"question": "a", "answer": "b"}],
            {},
            "{path} has the fields question, answer, but wanted are messages; conversations; "
            "instruction and output; prompt and completion; text; data.columns maps the names.",
        ),
        (
            [GOOD],
            {"columns": {"input": "context"}},
            "data.columns.input is 'context', but {path} has the fields instruction, output.",
        ),
        (
            [GOOD, GOOD, {"prompt": "a", "completion": "b"}],
            {},
            "Record 3 of {path} is in the prompt form, but the first one is in the instruction "
            "form.",
        ),
        (
            [GOOD, {"instruction": "c"}],
            {},
            "Record 2 of {path} holds only instruction, but the first one is in the instruction "
            "form.",
        ),
        (
            [{"instruction": ["a"], "output": "b"}],
            {},
            "Record 1 of {path} has no text in 'instruction' but a list; give one text.",
        ),
        (
            [{"messages": CHAT}, {"messages": [*CHAT[1:2], *CHAT[1:]]}],
            {},
            "Record 2 of {path} has a message of the user where the other side's turn is; user and "
            "assistant have to alternate, a system message to come first.",
        ),
        (
            [{"messages": [{"role": "tool", "content": "x"}]}],
            {},
            "Record 1 of {path} has the role 'tool'; known are user, human, assistant, gpt, "
            "chatgpt, model, system.",
        ),
        (
            [{"messages": [{"speaker": "me", "content": "x"}]}],
            {},
            "Record 1 of {path} has a message with speaker, content; wanted are role and content, "
            "or from and value, as texts.",
        ),
        ([{"messages": "Hi"}], {}, "Record 1 of {path} holds no list of messages."),
        ([{"messages": CHAT[:2]}], {}, "Record 1 of {path} holds no question with an answer."),
        (
            [{"text": "a"}],
            {"chat_template": True},
            "Record 1 of {path} is in the text form, which data.chat_template has no use for.",
        ),
    ],
)
def test_what_is_wrong_with_records_is_said(
    records: list[dict[str, Any]],
    arguments: dict[str, Any],
    message: str,
    build: Any,
    chatml: Any,
    tmp_path: Path,
) -> None:
    path = write(tmp_path / "own.json", *records)
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the whole message is compared)
        build(path, tokenizer=chatml, **arguments)
    assert str(error.value) == message.format(path=path)


@pytest.mark.parametrize("kind", ["json", "jsonl", "csv"])
def test_an_empty_file_is_named(kind: str, build: Any, tmp_path: Path) -> None:
    path = tmp_path / f"own.{kind}"
    path.write_text("")
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))} holds no record\.$"):
        build(path)


def test_a_broken_line_is_named(build: Any, tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text(f'{json.dumps(GOOD)}\n{{"instruction": "a", "out\n')
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))} is not JSON \(line 2: "):
        build(path)


def test_a_missing_file_is_named(build: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"^{re.escape(str(tmp_path))}/no.jsonl does not exist"):
        build(tmp_path / "no.jsonl")
    path = write(tmp_path / "own.jsonl", GOOD)
    with pytest.raises(ValueError, match=r"no\.csv does not exist"):
        build(path, val_file=str(tmp_path / "no.csv"))


def test_nothing_to_test_is_said(build: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "own.jsonl", {"text": "a"})
    with pytest.raises(ValueError, match=r"^data.test_file is not set, nor data.test_split, so t"):
        build(path, "test")
    with pytest.raises(ValueError, match=r"own.jsonl is in the text form, which asks nothing to t"):
        build(path, "test", test_file=path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"template": "Q: {question}"}, "data.template 'Q: {question}' has no place for {instruct"),
        ({"template": "{instruction}", "chat_template": True}, "are both set; take one."),
        ({"columns": {"inputs": "x"}}, "data.columns 'inputs' is unknown; did you mean 'input'?"),
        ({"test_file": "a", "test_split": "b"}, "data.test_file and data.test_split are both set;"),
        ({"val_file": "a", "val_split": "b"}, "data.val_file and data.val_split are both set;"),
        ({"protocol": "vicuna"}, "data.protocol 'vicuna' is unknown; known are alpaca."),
    ],
)
def test_wrong_arguments_get_one_sentence(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        InstructionDataModule("own.jsonl", **arguments)
