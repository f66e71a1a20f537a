"""The tasks whose files `data_files` damages: how each is read, and what it should become."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_rows import (
    Records,
    asked,
    code,
    commonsense,
    conversation,
    dart,
    dialogsum,
    fitted,
    glue,
    gsm8k,
    labelled,
    mbpp,
    messages,
    mt_bench,
    own,
    prompt,
    referenced,
    row,
    tested,
    text,
)

from lightning_peft.datamodules import (
    CodeDataModule,
    CommonsenseDataModule,
    ConversationDataModule,
    DartDataModule,
    DialogSumDataModule,
    E2EDataModule,
    InstructionDataModule,
    MathDataModule,
)
from lightning_peft.datamodules.math.answers import boxed

REAL = Path(__file__).parents[2].parent / "shared" / "data"


@dataclass(frozen=True)
class Task:
    """One task's file.

    Attributes:
        kind: Its form.
        file: Where it lies in the task's folder.
        read: Sets the data module up over a folder; returns what its rows hold.
        wanted: The same of records, by hand.
        ours: Small records of ours.
        real: Where real ones lie among the real data; the ``first`` and two more are taken.
        beside: Further files, which are not damaged.
    """

    kind: str
    file: str
    read: Callable[[Path, Any], Any]
    wanted: Callable[[Records, Any], Any]
    ours: Records
    real: str = ""
    first: int = 0
    beside: Mapping[str, Records] = field(default_factory=dict)


INSTRUCTIONS: Records = [
    {"instruction": "Add 00501.", "input": "1.50", "output": "502.50"},
    {"instruction": "Say “é”.", "input": "x, y", "output": "é\nis said"},
    {"instruction": "Is it so?", "input": "None", "output": "true"},
]
CHATS: Records = [
    {"messages": [{"role": r, "content": f"{r} {i}"} for r in ("system", "user", "assistant")]}
    for i in range(3)
]
PAIRS = [{"sentence1": f"a {i}", "sentence2": "b", "label": "entailment"} for i in range(3)]
own_data = {
    f"own {kind}": Task(
        kind,
        f"own.{kind}",
        fitted(InstructionDataModule, data_dir=f"own.{kind}"),
        own,
        INSTRUCTIONS,
    )
    for kind in ("csv", "json", "jsonl", "parquet")
}
TASKS: dict[str, Task] = {
    **own_data,
    "own messages": Task(
        "jsonl", "own.jsonl", fitted(InstructionDataModule, data_dir="own.jsonl"), messages, CHATS
    ),
    "e2e": Task(
        "csv",
        "devset.csv",
        fitted(E2EDataModule, train_split="dev", val_size=0),
        referenced(E2EDataModule, lambda r: (text(r, "mr"), [text(r, "ref")])),
        [{"mr": "name[A]", "ref": "A, it is."}, {"mr": "name[B]", "ref": 'B is "it".'}],
        "nlg/e2e/devset.csv",
    ),
    "dialogsum": Task(
        "jsonl",
        "dialogsum.dev.jsonl",
        fitted(DialogSumDataModule, train_split="dev", val_size=0),
        referenced(DialogSumDataModule, dialogsum),
        [{"dialogue": "a", "summary": "b"}, {"dialogue": "c", "summary": "d"}],
        "nlg/dialogsum/dialogsum.dev.jsonl",
    ),
    "dart": Task(
        "json",
        "dart-dev.json",
        fitted(DartDataModule, train_split="dev", val_size=0),
        referenced(DartDataModule, dart),
        [{"tripleset": [["a", "b", "c"]], "annotations": [{"source": "x", "text": "d"}]}],
        "nlg/dart/dart-v1.1.1-full-dev.json",
    ),
    "commonsense": Task(
        "json",
        "boolq/train.json",
        fitted(CommonsenseDataModule, val_size=0),
        lambda records, t: [
            row(t, commonsense(r), text(r, "output"), loss_on="all") for r in records
        ],
        [{"instruction": "a", "input": "", "output": "the correct answer is true"}] * 2,
        "commonsense/boolq/train.json",
    ),
    "commonsense test": Task(
        "json",
        "piqa/test.json",
        tested(CommonsenseDataModule),
        lambda records, t: [(prompt(t, commonsense(r)), text(r, "answer")) for r in records],
        [{"instruction": "a", "input": "", "output": "b", "answer": "solution1"}] * 2,
        "commonsense/piqa/test.json",
    ),
    "gsm8k": Task(
        "jsonl",
        "gsm8k/train.jsonl",
        fitted(MathDataModule, train_on="gsm8k", val_size=0),
        gsm8k,
        [{"question": "a", "answer": "b\n#### 1,000"}, {"question": "c", "answer": "#### 2"}],
        "math/gsm8k/train.jsonl",
    ),
    "MATH": Task(
        "jsonl",
        "MATH/test.jsonl",
        tested(MathDataModule),
        lambda records, t: [
            (prompt(t, asked(MathDataModule, text(r, "problem"))), boxed(text(r, "solution")))
            for r in records
        ],
        [{"problem": "a", "solution": "\\boxed{1}"}, {"problem": "b", "solution": "\\boxed 2"}],
        "math/MATH/test.jsonl",
    ),
    "SVAMP": Task(
        "json",
        "SVAMP/test.json",
        tested(MathDataModule, protocol="llm_adapters"),
        lambda records, t: [
            (
                prompt(t, asked(MathDataModule, text(r, "instruction"), "llm_adapters")),
                str(r["answer"]),
            )
            for r in records
        ],
        [{"instruction": "a", "answer": "1.0"}, {"instruction": "b", "answer": 2}],
        "math/SVAMP/test.json",
    ),
    "conversation": Task(
        "json",
        "train.json",
        fitted(ConversationDataModule, val_size=0),
        conversation,
        [{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}] * 2,
        "conversation/sharegpt/train.json",
    ),
    "mt_bench": Task(
        "jsonl",
        "mt_bench/question.jsonl",
        tested(ConversationDataModule),
        mt_bench,
        [{"question_id": i, "category": "math", "turns": ["a", "b"]} for i in (1, 2)],
        "conversation/mt_bench/question.jsonl",
    ),
    "codefeedback": Task(
        "json",
        "codefeedback/filtered.json",
        fitted(CodeDataModule, val_size=0),
        code("query", "answer"),
        [{"query": "a", "answer": "b", "lang": "python"}, {"query": "c", "answer": "d"}],
    ),
    "evol_instruct_code": Task(
        "json",
        "evol_instruct_code/train.json",
        fitted(CodeDataModule, train_on="evol_instruct_code", val_size=0),
        code("instruction", "output"),
        [{"instruction": "a", "output": "b"}, {"instruction": "c", "output": "d"}],
        "code/evol_instruct_code/train.json",
    ),
    "mbpp": Task(
        "jsonl",
        "mbpp/mbpp.jsonl",
        tested(CodeDataModule, tasks=["mbpp"], allow_code_execution=True),
        mbpp,
        [{"task_id": 11, "text": "a", "test_list": ["assert b"], "test_setup_code": ""}] * 2,
        "code/mbpp/mbpp.jsonl",
        10,
    ),
    "rte": Task(
        "tsv",
        "RTE/train.tsv",
        labelled("rte"),
        glue("sentence1", "sentence2", ("entailment", "not_entailment")),
        PAIRS,
        "glue/RTE/train.tsv",
        beside={"RTE/dev.jsonl": PAIRS},
    ),
    "mnli": Task(
        "jsonl",
        "MNLI/dev_matched.jsonl",
        labelled("mnli", True),
        glue("premise", "hypothesis", ("entailment", "neutral", "contradiction")),
        [{"premise": "a", "hypothesis": "b", "label": 1}] * 2,
        "glue/MNLI/dev_matched.jsonl",
    ),
}
