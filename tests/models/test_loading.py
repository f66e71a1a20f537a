"""A base model is loaded as transformers loads it, or refused in one sentence."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lightning_peft.assets import TINY_LLAMA
from lightning_peft.errors import UserError
from lightning_peft.models.checking import BaseSource
from lightning_peft.models.loading import load_causal_lm, load_classifier
from lightning_peft.testing import tiny_llama


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_llama().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_a_causal_model_is_that_of_transformers_in_training_mode(dtype: str, folder: Path) -> None:
    ours = load_causal_lm(BaseSource(str(folder), dtype))
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    assert ours.training
    assert ours.dtype == {"auto": torch.float32, "bfloat16": torch.bfloat16}[dtype]
    for (name, one), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(one, other), name


def test_the_attention_is_that_which_was_asked_for(folder: Path) -> None:
    model = load_causal_lm(BaseSource(str(folder), attn_implementation="eager"))
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("labels", "regression", "outputs", "problem"),
    [
        (["a", "b", "c"], False, 3, "single_label_classification"),
        (["score"], True, 1, "regression"),
    ],
)
def test_a_classifier_gets_a_head_of_its_classes(
    labels: list[str], regression: bool, outputs: int, problem: str, folder: Path
) -> None:
    model, head = load_classifier(BaseSource(str(folder)), labels, regression)
    assert head == ["score"]
    assert model.training
    assert model.score.out_features == outputs
    assert model.config.id2label == dict(enumerate(labels))
    assert model.config.problem_type == problem


def test_files_that_are_no_weights_are_told(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")
    (folder / "model.safetensors").rename(folder / "other")
    with pytest.raises(ValueError, match="has a config.json but no weights"):
        load_causal_lm(BaseSource(str(folder)))


@pytest.mark.parametrize("answer", ["y", "n"])
def test_code_beside_a_model_is_never_run_nor_asked_about(
    answer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, made = tmp_path / "own", tmp_path / "made"
    shutil.copytree(TINY_LLAMA, folder)
    config = json.loads((folder / "config.json").read_text())
    code = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (folder / "config.json").write_text(
        json.dumps({**config, "auto_map": code, "model_type": "evil"})
    )
    (folder / "evil.py").write_text(f"import os; os.mkdir({str(made)!r})\n")
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda text="": asked.append(text) or answer)
    name = re.escape(str(folder))
    with pytest.raises(UserError, match=rf"^model.model_name_or_path: {name} cannot be loaded: .+"):
        load_causal_lm(BaseSource(str(folder)))
    assert not asked
    assert not made.exists()
