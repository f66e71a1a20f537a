"""Texts of any kind, and real records of mathematics."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

PIECES = [
    *(
        "\\",
        "{",
        "}",
        "$",
        "/",
        "=",
        ".",
        ",",
        "-",
        "+",
        "%",
        "^",
        "_",
        " ",
        "\n",
        "\x00",
        "é",
        "٣",
    ),
    *("\\frac", "\\sqrt", "\\text{ ", "\\boxed", "\\fbox", "\\left", "\\circ", "\\%", "\\!"),
    *("0", "7", "12", "0.5", "x", "A", "#### ", "The answer is: ", ".\n", "9" * 40),
]


@pytest.fixture(scope="session")
def random_texts() -> Callable[..., list[str]]:
    """Makes texts of up to twelve pieces that rules may stumble over."""

    def make(count: int, seed: int = 0) -> list[str]:
        rng = random.Random(seed)
        return ["".join(rng.choices(PIECES, k=rng.randint(0, 12))) for _ in range(count)]

    return make


@pytest.fixture(scope="session")
def records(real: Callable[[str], Path]) -> Callable[[str], list[dict[str, Any]]]:
    """Reads a real file, or skips."""

    def read(name: str) -> list[dict[str, Any]]:
        text = real(f"math/{name}").read_text(encoding="utf-8")
        lines = name.endswith(".jsonl")
        return [json.loads(line) for line in text.splitlines()] if lines else json.loads(text)

    return read
