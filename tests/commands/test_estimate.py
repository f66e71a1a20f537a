"""An estimate is printed of a configuration alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import LlamaConfig

from lightning_peft.commands import estimate as command
from lightning_peft.errors import UserError

QUICKSTART = str(Path(__file__).parents[2] / "configs" / "quickstart.yaml")


@pytest.fixture(autouse=True)
def argv(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["lightning-peft"])


def test_rows_tokens_and_devices_are_those_given(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--config", QUICKSTART, "--rows", "3", "--tokens", "20", "--devices", "2"]
    command.main([*words, "--model.adapter", "LoRA", "--model.adapter.r", "4"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["strategy", "LoRA"]
    assert any("memory of each device, of 2 devices with ZeRO stage 0" in line for line in lines)
    start, end = (next(li for li in lines if at in li) for at in ("at the start", "at the end"))
    assert start.split()[5] == end.split()[5] == "38,912"  # 9,728 values a rank
    assert "3 rows of 20 tokens" in lines[-1]


def test_a_method_that_prunes_the_base_leaves_the_merged_model_alone(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["--config", QUICKSTART, "--rows", "3", "--tokens", "20"]
    command.main([*words, "--model.adapter", "LoRAPrune", "--model.adapter.r", "4"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].split(maxsplit=1) == ["export", "none but the merged model"]
    start, end = (next(li for li in lines if at in li) for at in ("at the start", "at the end"))
    # In each of four layers q and o lose 64 values a rank, k and v 32, those of the MLP 192.
    lost = 4 * 4 * (2 * 64 + 2 * 32 + 3 * 192)
    assert int(end.split()[5].replace(",", "")) == 38_912 - lost
    assert start.split()[5] == "38,912"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--rows", "-1", "--tokens", "20"], "--rows must be given, above zero"),
        (["--devices", "0"], "--devices: 0 is below 1."),
        (["--zero_stage", "7"], "--zero_stage: invalid choice: 7"),
        (["--model.adapter.p", "2"], r"^model.adapter: p must lie in"),
        (["--model.adapter.q", "2"], "model.adapter.q is no argument of DropLoRA"),
    ],
)
def test_what_is_wrong_is_one_sentence(words: list[str], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        command.main(["--config", QUICKSTART, *words])


def test_the_command_needs_a_configuration_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2
    ).save_pretrained(tmp_path)
    words = ["--config", QUICKSTART, "--model.model_name_or_path", str(tmp_path)]
    command.main([*words, "--devices", "2", "--zero_stage", "1", "--tokens", "20"])
    printed = capsys.readouterr().out
    assert "memory of each device, of 2 devices with ZeRO stage 1" in printed
    assert "128 rows of 20 tokens" in printed
