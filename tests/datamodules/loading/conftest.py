"""Rows to load, of which each is known by its first token, and files of records."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from lightning_peft.datamodules.loading.batches import training_batch
from lightning_peft.datamodules.loading.examples import Example
from lightning_peft.datamodules.loading.files import read_file
from lightning_peft.datamodules.loading.samplers import (
    LengthGroupedBatchSampler,
    RandomBatchSampler,
)

LENGTHS = np.random.default_rng(3).integers(4, 90, size=157)


class Rows:
    """Row i has LENGTHS[i] tokens, the first of them i; the last i % 3 + 1 carry labels."""

    def __len__(self) -> int:
        return len(LENGTHS)

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[list[int], list[int]]]:
        ends = [(i, int(LENGTHS[i])) for i in map(int, indices)]
        return [([i] * end, [end - i % 3 - 1, end]) for i, end in ends]

    def collate(self, rows: Any) -> dict[str, Any]:
        return training_batch(rows, 0)

    def count_targets(self, indices: Sequence[int]) -> int:
        return sum(int(i) % 3 + 1 for i in indices)

    def lengths(self) -> np.ndarray:
        return LENGTHS

    def strata(self) -> np.ndarray:
        return np.arange(len(LENGTHS)) % 5


@pytest.fixture(scope="session")
def lengths() -> np.ndarray:
    return LENGTHS


@pytest.fixture(scope="session")
def data() -> Rows:
    return Rows()


@pytest.fixture(scope="session")
def sampler() -> Callable[..., RandomBatchSampler]:
    """Makes batches of eight of them, ``random`` or ``grouped`` by length."""

    def make(kind: str = "random", **kwargs: Any) -> RandomBatchSampler:
        if kind == "grouped":
            return LengthGroupedBatchSampler(LENGTHS, 8, **kwargs)
        return RandomBatchSampler(len(LENGTHS), 8, **kwargs)

    return make


@pytest.fixture(scope="session")
def example() -> Callable[..., Example]:
    def make(prompt: str, response: str = "", index: int = 0) -> Example:
        return Example(prompt, response, "capitals", index, "x")

    return make


@pytest.fixture(scope="session")
def conversation() -> Callable[..., Example]:
    """Makes one of three turns."""

    def make(**changes: Any) -> Example:
        turns = {"history": (("ab", "c"), ("d", "ef"))}
        return Example("g", "hi", "chat", 0, **{**turns, **changes})

    return make


@pytest.fixture
def texts() -> list[dict[str, Any]]:
    """Records with what a file's form may stumble over."""
    return [{"q": "one", "n": 1}, {"q": "two,\n\u2028zwei", "n": 2}, {"q": 'th"ree', "n": 3}]


@pytest.fixture(scope="session")
def write_rows() -> Callable[[Path, list[dict[str, Any]]], Path]:
    def write(path: Path, rows: list[dict[str, Any]]) -> Path:
        """Write rows in the form that the file's name tells."""
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix.lower() == ".json":
            path.write_text(json.dumps(rows), encoding="utf-8")
        elif path.suffix.lower() == ".jsonl":
            lines = (json.dumps(row, ensure_ascii=False) for row in rows)
            path.write_text("\n".join(lines), encoding="utf-8")
        elif path.suffix.lower() == ".csv":
            with path.open("w", encoding="utf-8", newline="") as file:
                writer = csv.DictWriter(file, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
        else:
            datasets.Dataset.from_list(rows).to_parquet(str(path))
        return path

    return write


@pytest.fixture
def read() -> Callable[..., list[dict[str, Any]]]:
    return read_file


@pytest.fixture(scope="session")
def refused() -> Callable[[str], Any]:
    def refused(sentence: str) -> Any:
        """The whole message is this, in one line; ``…`` stands for a library's own words."""
        pattern = ".+".join(map(re.escape, sentence.split("…")))
        return pytest.raises(ValueError, match=rf"\A{pattern}\Z")

    return refused
