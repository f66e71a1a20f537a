"""The page of the command ``estimate``."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import LlamaConfig

from lightning_peft.commands import estimate as command


def test_the_command_needs_a_configuration_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["lightning-peft"])
    LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2
    ).save_pretrained(tmp_path)
    words = ["--config", "configs/quickstart.yaml", "--model.model_name_or_path", str(tmp_path)]
    command.main([*words, "--devices", "2", "--zero_stage", "1", "--tokens", "20"])
    printed = capsys.readouterr().out
    assert "memory of each device, of 2 devices with ZeRO stage 1" in printed
    assert "128 rows of 20 tokens" in printed
