"""The commands of the trainer run the CLI with their words, and leave the job when it is done."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_peft.commands import train


def test_the_words_go_to_the_class(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[Any] = []
    monkeypatch.setattr(train, "make_cli", lambda words, cli: done.append((words, cli)))
    monkeypatch.setattr(train.distributed, "leave", lambda: done.append("left"))
    train.main(["fit", "--x", "1"])
    assert done == [(["fit", "--x", "1"], train.PeftCLI), "left"]
