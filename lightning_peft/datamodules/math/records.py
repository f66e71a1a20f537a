"""Where records of mathematics lie, and their gold answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_peft.datamodules.loading.records import Source
from lightning_peft.datamodules.math.answers import MARKER, boxed, gsm8k_gold, same_number
from lightning_peft.errors import UserError, shown


def _source(folder: str, split: str, hub: str, *texts: str, config: str | None = None) -> Source:
    files = tuple(f"{folder}/{split}*.{end}" for end in ("jsonl", "json", "parquet"))
    # An answer may be a number, which `gold` reads.
    required, texts = ((), texts) if hub else (texts[1:], texts[:1])
    return Source(files, hub, split or "train", config, required, texts)


TRAINING = {
    "metamathqa": _source("metamathqa", "", "meta-math/MetaMathQA", "query", "response"),
    "gsm8k": _source("gsm8k", "train", "openai/gsm8k", "question", "answer", config="main"),
}
TESTS = {
    "gsm8k": _source("gsm8k", "test", "openai/gsm8k", "question", "answer", config="main"),
    "MATH": _source("MATH", "test", "DigitalLearningGmbH/MATH-lighteval", "problem", "solution"),
    "SVAMP": _source("SVAMP", "test", "", "instruction", "answer"),
    "AQuA": _source("AQuA", "test", "", "instruction", "answer"),
}


def with_marker(answer: str, place: str = "A GSM8K record") -> str:
    """End a GSM8K answer as MetaMathQA's end: ``The answer is: 18``."""
    return f"{answer}\n{MARKER}{gsm8k_gold(answer, place)}"


def gold(task: str, record: Mapping[str, Any], number: int) -> str:
    """Return a test record's gold answer; ``number`` names it where it has none.

    Raises:
        UserError: If there is none that answers can be compared with.
    """
    if task == "MATH":
        answer = boxed(record["solution"])
        if answer is None:
            raise UserError(f"Record {number} of MATH has no \\boxed answer in its solution.")
        return answer
    text = str(record["answer"])
    if task == "gsm8k":
        text = gsm8k_gold(text, f"Record {number} of gsm8k")
    comparable = (text in tuple("ABCDE")) if task == "AQuA" else same_number(text, text)
    if not comparable:
        wanted = "letter from A to E" if task == "AQuA" else "number"
        raise UserError(
            f"Record {number} of {task} has the answer {shown(text)}, which is no {wanted}."
        )
    return text
