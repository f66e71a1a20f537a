from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lightning_peft.datamodules.code import execution
from lightning_peft.datamodules.code import module as code_data
from lightning_peft.datamodules.code.module import CodeDataModule

BELOW = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request."
)
HUMANEVAL = {
    "task_id": "HumanEval/0",
    "prompt": "import math\n\n\ndef half(x: int) -> int:\n    '''Round {down}.'''\n",
    "entry_point": "half",
    "canonical_solution": "    return math.floor(x / 2)\n",
    "test": "def check(candidate):\n    assert candidate(3) == 1\n    assert candidate(8) == 4\n",
}
MBPP = {
    "task_id": 11,
    "text": "Write a function that adds. ",
    "code": "def add(a, b):\r\n    return a + b",
    "test_setup_code": "",
    "test_list": ["assert add(1, 2) == 3", "assert add(0, 0) == 0"],
}
Build = Callable[..., CodeDataModule]


@pytest.fixture
def build(build_data: Any) -> Build:
    def make(folder: Path | str | None, stage: str = "fit", **kwargs: Any) -> CodeDataModule:
        options: dict[str, Any] = {"max_length": 1000, "val_size": 0, "batch_size": 4} | kwargs
        return build_data(CodeDataModule, folder, stage=stage, **options)

    return make


@pytest.fixture
def folder(tmp_path: Path, write_records: Any) -> Path:
    write_records(tmp_path / "d" / "humaneval" / "HumanEval.jsonl", [HUMANEVAL] * 2)
    ids = [10, 11, 12, 510, 511, 602]
    write_records(tmp_path / "d" / "mbpp" / "mbpp.jsonl", [{**MBPP, "task_id": n} for n in ids])
    return tmp_path / "d"


def template(instruction: str) -> str:
    return f"{BELOW}\n\n\n### Instruction:\n{instruction}\n\n### Response:"


# Training -----------------------------------------------------------------------------------------

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Add é."},
    {"role": "assistant", "content": "a+b"},
    {"role": "user", "content": "And {half}?"},
    {"role": "assistant", "content": "a/2"},
]
# What is given and what is learnt, in turn.
ROWS = {
    ("query", "droplora"): [template("Q é?"), "code"],
    ("query", "prunedlora"): ["User: Q é?\n", "code"],
    ("alpaca", "droplora"): [template("Q é?\non 1"), "code"],
    ("alpaca", "prunedlora"): ["User: Q é?\non 1\n", "code"],
    ("messages", "droplora"): [
        template("Be brief.\nAdd é."),
        "a+b",
        template("And {half}?"),
        "a/2",
    ],
    ("messages", "prunedlora"): ["System: Be brief.\nUser: Add é.\nUser: And {half}?\n", "a/2"],
}
RECORDS: dict[str, dict[str, Any]] = {
    "query": {"query": "Q é?", "answer": "code", "resource": "x", "lang": "python"},
    "alpaca": {"instruction": "Q é?", "input": "on 1", "output": "code"},
    "messages": {"id": 1, "messages": CHAT},
}


@pytest.mark.parametrize(("schema", "protocol"), ROWS)
def test_a_row_token_for_token(
    schema: str, protocol: str, build: Build, byte_ids: Any, tmp_path: Path, write_records: Any
) -> None:
    write_records(tmp_path / "codefeedback" / "train.json", [RECORDS[schema]] * 2)
    data = build(tmp_path, protocol=protocol)
    ids: list[int] = []
    labels: list[int] = []
    for given, learnt in zip(
        ROWS[schema, protocol][::2], ROWS[schema, protocol][1::2], strict=True
    ):
        ids += [*byte_ids(given), *byte_ids(learnt), 2]
        labels += [-100] * len(byte_ids(given)) + [*byte_ids(learnt), 2]
    batch = next(iter(data.train_dataloader()))
    assert batch["input_ids"].tolist() == [ids] * 2
    assert batch["labels"].tolist() == [labels] * 2


def test_other_languages_and_unanswered_questions_are_left_out_counted_and_said(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write_records: Any
) -> None:
    said: list[str] = []
    monkeypatch.setattr(code_data, "rank_zero_info", said.append)
    languages = ["python", "sql", "Python", "c"]
    records = [{"query": f"q{i}", "answer": "a", "lang": name} for i, name in enumerate(languages)]
    write_records(tmp_path / "codefeedback" / "CodeFeedback-Filtered-Instruction.jsonl", records)
    write_records(
        tmp_path / "codefeedback" / "Code-Feedback.jsonl",
        [{"messages": CHAT}, {"messages": CHAT[:2]}, {"messages": CHAT[:4]}],
    )
    data = build(tmp_path)
    assert data.counts["train"] == 2
    assert (data.counts["not_in_python"], data.counts["without_an_answer"]) == (2, 0)
    assert said == ["2 of 4 records of codefeedback are not in python and were left out."]
    assert [e.index for e in data.train_examples()] == [0, 2]
    data = build(tmp_path, train_on="codefeedback_chats", protocol="prunedlora")
    assert (data.counts["train"], data.counts["without_an_answer"]) == (2, 1)
    assert [e.response for e in data.train_examples()] == ["a/2", "a+b"]


@pytest.mark.parametrize(
    ("files", "columns"),
    [
        ([[{"prompt": "a", "code": "b"}]], "code, prompt"),
        ([[{"query": "a", "output": "b"}]], "output, query"),
        (
            [[{"query": "a", "answer": "b"}], [{"messages": CHAT}]],
            "answer, query beside messages",
        ),
        (
            [[{"query": "a", "answer": "b"}, {"query": "a", "answer": None}]],
            "answer, query beside query",
        ),
    ],
)
def test_wrong_columns_are_named(
    files: list[list[dict[str, Any]]],
    columns: str,
    build: Build,
    tmp_path: Path,
    write_records: Any,
) -> None:
    for i, records in enumerate(files):
        write_records(tmp_path / "codefeedback" / f"{i}.json", records)
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the whole message is compared)
        build(tmp_path)
    assert str(error.value) == (
        f"The records of codefeedback in {tmp_path} have the columns {columns}; wanted are query "
        "and answer, or messages, or instruction and output, the same in all of them."
    )


def test_messages_without_role_are_named(build: Build, tmp_path: Path, write_records: Any) -> None:
    write_records(
        tmp_path / "codefeedback" / "a.json", [{"messages": [{"from": "a", "value": "b"}]}]
    )
    with pytest.raises(
        ValueError, match=r"^Record 1 of codefeedback in .* has messages without ro"
    ):
        build(tmp_path)


# Tests --------------------------------------------------------------------------------------------


def test_code_is_run_only_where_that_is_allowed(build: Build, folder: Path) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the whole message is compared)
        build(folder, "test")
    assert str(error.value) == (
        "data.allow_code_execution is false, but answers in code are scored by running programs "
        "that the model wrote; set it to true to let them run on this machine, in a sandbox "
        "without network and with limits on time, memory and files."
    )


def test_a_machine_without_a_sandbox_is_told_before_anything_is_generated(
    build: Build, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(execution, "PLATFORM", "nt")
    with pytest.raises(ValueError, match="use WSL on Windows"):
        build(folder, "test", allow_code_execution=True)


@pytest.mark.parametrize("protocol", ["droplora", "prunedlora"])
def test_problems(protocol: str, build: Build, folder: Path, tokenizer: Any) -> None:
    tasks = ["humaneval", "mbpp", "mbpp_evalplus"]
    data = build(folder, "test", protocol=protocol, tasks=tasks, allow_code_execution=True)
    assert data.counts["test"] == {"humaneval": 2, "mbpp": 3, "mbpp_evalplus": 3}
    humaneval = "import math\n\n\ndef half(x: int) -> int:\n    '''Round {down}.'''\n"
    mbpp = '"""\nWrite a function that adds.\nassert add(1, 2) == 3\n"""\n'
    asked = "Create a Python script for this problem:\n"
    for loader, text in zip(data.test_dataloader(), (humaneval, mbpp, mbpp), strict=True):
        batch = next(iter(loader))
        prompt = template(asked + text) if protocol == "droplora" else f"User: {text}\n"
        assert set(batch["prompt"]) == {prompt}
        assert tokenizer.decode(batch["input_ids"][0]) == prompt
    ids = [[e["task_id"] for e in next(iter(x))["expected"]] for x in data.test_dataloader()]
    assert ids == [["HumanEval/0"] * 2, [11, 12, 510], [11, 12, 602]]
    limits = {"droplora": (2048, 0.0), "prunedlora": (512, 0.0)}[protocol]
    assert (data.protocol.max_new_tokens, data.protocol.temperature) == limits


WHOLE = (
    "Sure:\n```python\ndef half(x):\n    return math.floor(x / 2)\n\nassert half(2) == 9\n```\nSo."
)
ADD = "```python\ndef add(a, b):\n    return a + b\n```"


def test_judgement(build: Build, reason: Any) -> None:
    data = build(None, "none", seconds=30)
    outputs = {
        "humaneval": {
            HUMANEVAL["canonical_solution"]: "passed",
            "return math.floor(x / 2)": "passed",  # decoding lost the first spaces
            "    y = x\n\n    return y // 2\n\nprint(half('a'))": "passed",  # what follows is cut
            "\n    return x // 2\n\n\ndef other():\n    return": "passed",
            WHOLE: "passed",
            f"{HUMANEVAL['prompt']}    return x // 2": "passed",
            "```python\ndef third(x):\n    return x // 2\n```": "IndentationError",
            "    return x": "AssertionError: assert candidate(3) == 1",
            "I would halve it.": "SyntaxError",
            "": "AssertionError",
            "    import os\n    os._exit(0)": "exited with code 0 before its end",
        },
        "mbpp": {
            ADD: "passed",
            "def add(a, b):\n    return 3": "AssertionError: assert add(0, 0) == 0",
            "def plus(a, b):\n    return a + b": "NameError",
        },
    }
    for task, expected in outputs.items():
        problem = HUMANEVAL if task == "humaneval" else MBPP
        pairs = enumerate(expected)
        rows = [{"index": i, "prompt": "", "output": o, "expected": problem} for i, o in pairs]
        data.judge(task, rows)
        for row, reason in zip(rows, expected.values(), strict=True):
            assert row["reason"].startswith(reason), row
            assert row["correct"] is (reason == "passed")
        passed = [r == "passed" for r in expected.values()]
        assert data.score(task, rows) == {"pass@1": sum(passed) / len(passed)}
        assert "assert" not in rows[4]["extracted"] if task == "humaneval" else True


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"protocol": "metamath"}, "data.protocol 'metamath' is unknown; known are droplora, pru"),
        ({"train_on": "code"}, "data.train_on 'code' is unknown; known are codefeedback, "),
        ({"tasks": ["mbpp+"]}, "data.tasks 'mbpp+' is unknown; did you mean 'mbpp'?"),
        ({"seconds": 0}, "data.seconds is 0; it has to be more than 0."),
    ],
)
def test_wrong_arguments_get_one_sentence(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the message's beginning is compared)
        CodeDataModule(None, **arguments)
    assert str(error.value).startswith(message)


# Real records -------------------------------------------------------------------------------------


def judged(data: CodeDataModule, task: str, answer: Callable[[Any], str], step: int = 1) -> Any:
    examples = data._problems(task)[::step]
    rows = [
        {"index": e.index, "prompt": e.prompt, "output": answer(e.expected), "expected": e.expected}
        for e in examples
    ]
    data.judge(task, rows)
    return rows


def test_real_records(build: Build, real: Any, real_counts: dict[str, int]) -> None:
    counts = {file.removeprefix("code/"): n for file, n in real_counts.items()}
    data = build(real("code"), "none", allow_code_execution=True)
    assert {task: len(data._problems(task)) for task in code_data.TASKS} == {
        "humaneval": counts["humaneval/HumanEval.jsonl"],
        "mbpp": 500,
        "mbpp_evalplus": 378,
    }
    assert counts["mbpp/mbpp.jsonl"] == 974
    evol = build(real("code"), "none", train_on="evol_instruct_code").train_examples()
    assert len(evol) == counts["evol_instruct_code/train.json"]
    chats = build(real("code"), "none", train_on="codefeedback_chats").train_examples()
    assert (len(chats), len(chats[0].history)) == (1, 1)
    filtered = build(real("code"), "none")
    assert filtered.train_examples() == []  # its one record is SQL
    assert filtered.counts["not_in_python"] == 1


def solutions(folder: Path, task: str) -> dict[Any, str]:
    file = {"humaneval": "humaneval/HumanEval.jsonl", "mbpp": "mbpp/mbpp.jsonl"}[task]
    column = {"humaneval": "canonical_solution", "mbpp": "code"}[task]
    lines = (folder / file).read_text(encoding="utf-8").splitlines()
    return {r["task_id"]: r[column] for r in map(json.loads, lines)}


@pytest.mark.parametrize("repeats", [False, True])
def test_humaneval_solutions_pass(repeats: bool, build: Build, real: Any) -> None:
    known = solutions(real("code"), "humaneval")

    def answer(problem: dict[str, Any]) -> str:
        text = known[problem["task_id"]]
        return f"```python\n{problem['prompt']}{text}\n```" if repeats else text

    rows = judged(build(real("code"), "none"), "humaneval", answer, step=3 if repeats else 1)
    assert [r["expected"]["task_id"] for r in rows if not r["correct"]] == []


@pytest.mark.slow
def test_mbpp_solutions_pass(build: Build, real: Any) -> None:
    known = solutions(real("code"), "mbpp")
    rows = judged(build(real("code"), "none"), "mbpp", lambda p: known[p["task_id"]])
    # It looks for amicable numbers below a limit in half a minute.
    assert [r["expected"]["task_id"] for r in rows if not r["correct"]] in ([], [123])


def test_other_problems_solutions_fail(build: Build, real: Any) -> None:
    known = solutions(real("code"), "mbpp")
    rows = judged(build(real("code"), "none"), "mbpp", lambda p: known[p["task_id"] + 1], step=20)
    assert sum(r["correct"] for r in rows) == 0
