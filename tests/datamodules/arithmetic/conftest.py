"""The tests' own arithmetic, and data modules whose texts are told apart by their labels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from lightning_peft.datamodules import ArithmeticDataModule


@pytest.fixture(scope="session")
def solve() -> Callable[..., Any]:
    def solve(prompt: str) -> str:
        """The tasks' definitions, one digit at a time."""
        a, operator, b = prompt[:3], prompt[3], prompt[4:7]
        assert len(prompt) == 8
        assert prompt[7] == "="
        if operator in "-%":
            difference = (int(a) - int(b)) * (1 if operator == "-" else -1)
            return ("-" if difference < 0 else "0") + str(abs(difference)).zfill(3)
        digits = [(int(x), int(y)) for x, y in zip(a, b, strict=True)]
        if operator == "&":
            return "0" + "".join(str(min(x, y)) for x, y in digits)
        assert operator == "^"
        return "0" + "".join(str((x + y) % 10) for x, y in digits)

    return solve


@pytest.fixture(scope="session")
def decoded() -> Callable[..., Any]:
    def decoded(tokenizer: Any, batch: dict[str, Any]) -> list[tuple[str, str]]:
        """Prompt and answer of every row, told apart by its labels."""
        pairs = []
        for ids, mask, labels in zip(
            batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True
        ):
            ids, labels = ids[mask.bool()], labels[mask.bool()]
            assert (labels[labels != -100] == ids[labels != -100]).all()
            learnt = labels != -100
            assert ids[learnt][-1] == tokenizer.eos_token_id
            pairs.append((tokenizer.decode(ids[~learnt]), tokenizer.decode(ids[learnt][:-1])))
        return pairs

    return decoded


@pytest.fixture(scope="session")
def module() -> Callable[..., Any]:
    def module(tokenizer: Any, **kwargs: Any) -> ArithmeticDataModule:
        data = ArithmeticDataModule(
            tokenizer=tokenizer, **{"val_size": 50, "test_size": 60, **kwargs}
        )
        data.setup()
        return data

    return module
