"""Wrong arguments, each told in one sentence."""

from __future__ import annotations

import io
import json
import re
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


@pytest.mark.parametrize("answer", ["y\n", ""])
def test_code_beside_a_tokenizer_is_never_run_nor_asked_about(
    answer: str, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer.save_pretrained(tmp_path / "own")
    path = tmp_path / "own" / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config |= {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}, "tokenizer_class": "Evil"}
    path.write_text(json.dumps(config))
    made = tmp_path / "made"
    (tmp_path / "own" / "evil.py").write_text(f"import os; os.mkdir({str(made)!r})\n")
    monkeypatch.setattr("sys.stdin", io.StringIO(answer))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked"))
    name = re.escape(str(tmp_path / "own"))
    with pytest.raises(
        UserError, match=rf"^data\.tokenizer '{name}' has a class of its own \(auto_"
    ):
        load_tokenizer(str(tmp_path / "own"))
    assert not made.exists()


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"5", b"null", b"\xff\xfe{", b"[" * 5000])
def test_a_broken_tokenizer_is_named(
    file: str, content: bytes, tokenizer: Any, tmp_path: Path
) -> None:
    tokenizer.save_pretrained(tmp_path / "own")
    (tmp_path / "own" / file).write_bytes(content)
    name = re.escape(str(tmp_path / "own"))
    with pytest.raises(
        UserError, match=rf"^data\.tokenizer '{name}' could not be loaded \(.+\); g"
    ):
        load_tokenizer(str(tmp_path / "own"))
