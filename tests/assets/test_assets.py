"""The embedded model and its name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lightning_peft.assets import TINY_LLAMA, resolve_model


def test_the_embedded_model_has_what_from_pretrained_reads() -> None:
    config = json.loads((TINY_LLAMA / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert (TINY_LLAMA / "model.safetensors").stat().st_size > 3_000_000
    assert (TINY_LLAMA / "tokenizer.json").is_file()


def test_its_name_is_its_folder_and_other_names_stay() -> None:
    assert resolve_model("tiny_llama") == str(TINY_LLAMA)
    assert resolve_model("meta-llama/Llama-2-7b-hf") == "meta-llama/Llama-2-7b-hf"


def test_a_folder_of_that_name_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny_llama").mkdir()
    assert resolve_model("tiny_llama") == "tiny_llama"
