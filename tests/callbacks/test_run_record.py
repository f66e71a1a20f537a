"""What a run leaves to take away, with adapters and without."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lightning_peft.adapters import adapter_layers, keep_components
from lightning_peft.callbacks.run_record import take_away
from lightning_peft.cli import main
from lightning_peft.strategies import FullFineTuning, LoRA

TINY = """
trainer: {accelerator: cpu, max_steps: 2, logger: false, enable_progress_bar: false,
  val_check_interval: 2}
model:
  class_path: CausalLMModule
  init_args:
    model_name_or_path: BASE
    adapter: ADAPTER
data:
  class_path: ArithmeticDataModule
  init_args: {batch_size: 4, eval_batch_size: 8, val_size: 8, test_size: 8}
"""


def test_adapters_are_written_in_pefts_format(tiny_llama, tmp_path: Path) -> None:
    LoRA(r=4).attach(model := tiny_llama())
    assert take_away(model, tmp_path).startswith("adapter (PEFT format)")
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()


def test_a_model_without_adapters_is_written_whole(
    tiny_llama, random_batch, logits, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    FullFineTuning().attach(model := tiny_llama())
    with torch.no_grad():
        model.lm_head.weight += 0.1 * torch.randn_like(model.lm_head.weight)
    for _ in range(2):  # the second replaces the first
        said = take_away(model, tmp_path)
    assert "its own weights were trained" in said
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(
        logits(loaded, random_batch(0)), logits(model, random_batch(0)), rtol=0, atol=0
    )


def test_where_all_components_are_gone_it_says_so(tiny_llama, tmp_path: Path) -> None:
    LoRA(r=1, target_modules=["q_proj"]).attach(model := tiny_llama())
    for layer in adapter_layers(model).values():
        keep_components(layer, torch.tensor([], dtype=torch.long))
    assert take_away(model, tmp_path) == "nothing: every layer has lost all its components"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("adapter", ["FullFineTuning", "GaLore"])
def test_a_fit_records_what_it_exported_and_export_writes_the_same(
    adapter: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    from safetensors.torch import load_file

    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text(TINY.replace("BASE", "tiny_llama").replace("ADAPTER", adapter))
    assert main(["fit", "--config", "c.yaml"]) in (0, None)
    run = tmp_path / "runs" / "version_0"
    record = json.loads((run / "run.json").read_text())
    assert "there is no adapter" in record["exported"]
    assert record["parameters"]["start"] == record["parameters"]["end"] > 0
    capsys.readouterr()
    assert main(["export", "--ckpt_path", str(run), "--output", "out"]) in (0, None)
    assert f"({adapter} has no adapter)" in capsys.readouterr().out
    written, exported = (
        load_file(folder / "model.safetensors") for folder in (run / "model", tmp_path / "out")
    )
    assert written.keys() == exported.keys()
    assert all(torch.equal(written[key], exported[key]) for key in written)
