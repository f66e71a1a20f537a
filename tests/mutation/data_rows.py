"""What the rows of a data module hold, by the module and by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

from lightning_peft.datamodules import (
    CodeDataModule,
    CommonsenseDataModule,
    ConversationDataModule,
    GlueDataModule,
    InstructionDataModule,
    MathDataModule,
)
from lightning_peft.datamodules.code.module import PROBLEM
from lightning_peft.datamodules.conversation.module import SYSTEM
from lightning_peft.datamodules.instruction.module import WITH_INPUT

LIMIT = 60_000
Records = list[dict[str, Any]]


# What rows hold -----------------------------------------------------------------------------------


def fitted(kind: Any, **arguments: Any) -> Callable[[Path, Any], Any]:
    """Token ids of every training row, and where its labels begin and end."""

    def read(folder: Path, tokenizer: Any) -> Any:
        data = made(kind, folder, tokenizer, arguments)
        data.setup("fit")
        rows = data.train_dataloader().dataset
        return [rows[i] for i in range(len(rows))]

    return read


def tested(kind: Any, **arguments: Any) -> Callable[[Path, Any], Any]:
    """Token ids of every prompt, and what is expected."""

    def read(folder: Path, tokenizer: Any) -> Any:
        data = made(kind, folder, tokenizer, arguments)
        with patch("lightning_peft.datamodules.code.module.run_program"):
            data.setup("test")
        sets = (loader.dataset for loader in data.test_dataloader())
        rows: Any = [row for rows in sets for row in (rows[i] for i in range(len(rows)))]
        return [(list(ids), example.expected) for ids, example in rows]

    return read


def labelled(task: str, held_out: bool = False) -> Callable[[Path, Any], Any]:
    """Texts and label of every record."""

    def read(folder: Path, tokenizer: Any) -> Any:
        data = made(GlueDataModule, folder, tokenizer, {"task": task})
        data.setup("validate")
        sets = data.held_out_records().values() if held_out else [data.train_records()]
        return [(r.first, r.second, r.label) for records in sets for r in records]

    return read


def made(kind: Any, folder: Path, tokenizer: Any, arguments: Mapping[str, Any]) -> Any:
    own = {key: value for key, value in arguments.items() if key != "data_dir"}
    path = str(folder / arguments.get("data_dir", ""))
    fixed = {"max_length": LIMIT, "cache_dir": str(folder / "cache"), "group_by_length": False}
    return kind(data_dir=path, tokenizer=tokenizer, **fixed, **own)


def row(tokenizer: Any, *pieces: str, loss_on: str = "response") -> Any:
    """Ids of prompts and responses in turn, and where the labels are."""
    ids, spans = prompt(tokenizer, ""), []
    for place, piece in enumerate(pieces):
        found = tokenizer(piece, add_special_tokens=False)["input_ids"]
        found = [*found, tokenizer.eos_token_id] if place % 2 else found
        spans += [len(ids), len(ids) + len(found)] if place % 2 else []
        ids = ids + found
    return ids, [0, len(ids)] if loss_on == "all" else spans


def prompt(tokenizer: Any, text: str) -> list[int]:
    begin = [tokenizer.bos_token_id]
    begin = begin if tokenizer("x")["input_ids"][:1] == begin else []
    return [*begin, *tokenizer(text, add_special_tokens=False)["input_ids"]]


def text(record: Mapping[str, Any], name: str, optional: bool = False) -> str:
    found = record.get(name)
    if found is None and optional:
        return ""
    assert isinstance(found, str), f"{name} is {found!r}"
    return found


def asked(kind: Any, instruction: str, protocol: str | None = None) -> str:
    protocols: Any = kind.protocols
    return protocols[protocol or next(iter(protocols))].template.replace(
        "{instruction}", instruction
    )


# Records by hand ----------------------------------------------------------------------------------


def own(records: Records, tokenizer: Any) -> Any:
    rows = []
    for r in records:
        question, added = text(r, "instruction"), text(r, "input", True)
        before, _, after = (WITH_INPUT if added else asked(InstructionDataModule, "\0")).partition(
            "{instruction}" if added else "\0"
        )
        after = after.replace("{input}", added, 1) if added else after
        rows.append(row(tokenizer, before + question + after, text(r, "output")))
    return rows


def messages(records: Records, tokenizer: Any) -> Any:
    rows = []
    for r in records:
        said = [(m["role"], text(m, "content")) for m in r["messages"]]
        system = said.pop(0)[1] if said[0][0] == "system" else ""
        while said[0][0] == "assistant":
            said.pop(0)
        assert [role for role, _ in said] == ["user", "assistant"] * (len(said) // 2) + ["user"] * (
            len(said) % 2
        )
        said = said[: len(said) // 2 * 2]
        said[0] = ("user", "\n\n".join(filter(None, (system, said[0][1]))))
        pieces = [asked(InstructionDataModule, t) if role == "user" else t for role, t in said]
        rows.append(row(tokenizer, *pieces))
    return rows


def commonsense(r: Mapping[str, Any]) -> str:
    added = text(r, "input", True)
    return asked(CommonsenseDataModule, "\n".join(filter(None, (text(r, "instruction"), added))))


def referenced(
    kind: Any, pair: Callable[[Mapping[str, Any]], tuple[str, Sequence[str]]]
) -> Callable[[Records, Any], Any]:
    """Sources, each with all its references, as pairs."""

    def wanted(records: Records, tokenizer: Any) -> Any:
        found: dict[str, list[str]] = {}
        for source, references in map(pair, records):
            kept = [reference for reference in references if reference]
            assert source
            assert kept
            found.setdefault(source, []).extend(kept)
        pairs = [(s, r) for s, references in found.items() for r in references]
        return [row(tokenizer, asked(kind, s), r) for s, r in pairs]

    return wanted


def dart(r: Mapping[str, Any]) -> tuple[str, Sequence[str]]:
    assert all(type(triple) is list for triple in r["tripleset"])
    return "\n".join(map(" | ".join, r["tripleset"])), [text(a, "text") for a in r["annotations"]]


def dialogsum(r: Mapping[str, Any]) -> tuple[str, Sequence[str]]:
    names = ("summary", "summary1", "summary2", "summary3")
    return text(r, "dialogue"), [text(r, name, True) for name in names]


def gsm8k(records: Records, tokenizer: Any) -> Any:
    rows = []
    for r in records:
        answer = text(r, "answer")
        assert "#### " in answer
        number = answer.rpartition("#### ")[2].replace(",", "").strip()
        response = f"{answer}\nThe answer is: {number}"
        rows.append(row(tokenizer, asked(MathDataModule, text(r, "question")), response))
    return rows


def conversation(records: Records, tokenizer: Any) -> Any:
    rows, sides = [], {"human": 0, "user": 0, "gpt": 1, "assistant": 1}
    for r in records:
        said = [m for m in [*r["conversations"], r.get("chosen")] if m]
        turns = [(m.get("role") or m["from"], m.get("content", m.get("value"))) for m in said]
        start = SYSTEM
        if turns and turns[0][0] == "system":
            start = turns.pop(0)[1] or SYSTEM
        while turns and sides[turns[0][0]]:
            turns.pop(0)
        turns = turns[: len(turns) // 2 * 2]
        if not turns:
            continue
        assert [sides[role] for role, _ in turns] == [0, 1] * (len(turns) // 2)
        pieces = [f" {t}" if sides[role] else f"USER: {t} ASSISTANT:" for role, t in turns]
        rows.append(row(tokenizer, f"{start} {pieces[0]}", *pieces[1:]))
    return rows


def code(question: str, answer: str) -> Callable[[Records, Any], Any]:
    def wanted(records: Records, tokenizer: Any) -> Any:
        kept = [r for r in records if (text(r, "lang", True) or "python").lower()[:2] == "py"]
        pairs = [
            ("\n".join(filter(None, (text(r, question), text(r, "input", True)))), text(r, answer))
            for r in kept
        ]
        return [row(tokenizer, asked(CodeDataModule, q), a) for q, a in pairs if a]

    return wanted


def mbpp(records: Records, tokenizer: Any) -> Any:
    rows = []
    for r in records:
        assert type(r["task_id"]) is int
        assert all(isinstance(test, str) for test in r["test_list"])
        problem = f'"""\n{text(r, "text").strip()}\n{r["test_list"][0]}\n"""\n'
        expected = {name: r.get(name) for name in ("task_id", "test_setup_code", "test_list")}
        if 11 <= r["task_id"] <= 510:
            ids = prompt(tokenizer, asked(CodeDataModule, f"{PROBLEM}{problem}"))
            rows.append((ids, expected))
    return rows


def mt_bench(records: Records, tokenizer: Any) -> Any:
    tasks: dict[str, list[Any]] = {}
    for r in records:
        first, _ = map(str, r["turns"])
        expected = {"question_id": r["question_id"], "turns": r["turns"]}
        ids = prompt(tokenizer, asked(ConversationDataModule, first))
        tasks.setdefault(r["category"], []).append((ids, expected))
    return [found for rows in tasks.values() for found in rows]


def glue(first: str, second: str, names: Sequence[str]) -> Callable[[Records, Any], Any]:
    def wanted(records: Records, tokenizer: Any) -> Any:
        labels = {n: i for i, n in enumerate(names)} | {str(i): i for i in range(len(names))}
        return [(text(r, first), text(r, second), labels[str(r["label"])]) for r in records]

    return wanted
