"""Wrong arguments, each told in one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lightning_peft.datamodules.loading.arguments import at_least, known, load_tokenizer
from lightning_peft.errors import UserError


def test_a_count_that_is_too_small_is_refused() -> None:
    assert at_least(1, "batch_size", 1) == 1
    with pytest.raises(UserError, match=r"^data\.batch_size is 0; it has to be 1 or more\.$"):
        at_least(1, "batch_size", 0)


def test_a_name_that_is_unknown_is_answered_by_the_nearest_or_all() -> None:
    names = {"humaneval": 1, "mbpp": 2}
    assert known("tasks", "mbpp", names) == "mbpp"
    with pytest.raises(UserError, match=r"^data\.tasks 'mbp' is unknown; did you mean 'mbpp'\?$"):
        known("tasks", "mbp", names)
    with pytest.raises(UserError, match=r"'x' is unknown; known are humaneval, mbpp\.$"):
        known("tasks", "x", names)


def test_a_tokenizer_is_loaded_from_its_folder_or_named(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path / "saved")
    text = "Ho é"
    loaded = load_tokenizer(str(tmp_path / "saved"))
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    missing = str(tmp_path / "none")
    with pytest.raises(
        UserError, match=rf"^data\.tokenizer '{missing}' could not be loaded \("
    ) as e:
        load_tokenizer(missing)
    assert "\n" not in str(e.value)
