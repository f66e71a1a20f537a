"""Where records of mathematics lie, and their gold answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_peft.datamodules.math_answers import MARKER, boxed, gsm8k_gold
from lightning_peft.datamodules.records import Source


def _source(folder: str, split: str, hub: str, *required: str, config: str | None = None) -> Source:
    files = tuple(f"{folder}/{split}*.{end}" for end in ("jsonl", "json", "parquet"))
    return Source(files, hub, split or "train", config, required)


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


def with_marker(answer: str) -> str:
    """End a GSM8K answer as MetaMathQA's end: ``The answer is: 18``."""
    return f"{answer}\n{MARKER}{gsm8k_gold(answer)}"


def gold(task: str, record: Mapping[str, Any], number: int) -> str:
    """Return a test record's gold answer; ``number`` names it where it has none."""
    if task == "gsm8k":
        return gsm8k_gold(record["answer"])
    if task != "MATH":
        return str(record["answer"])
    answer = boxed(record["solution"])
    if answer is None:
        raise ValueError(f"Record {number} of MATH has no \\boxed answer in its solution.")
    return answer
