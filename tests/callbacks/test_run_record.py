"""The record of a run, in run.json."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lightning_peft.cli import main

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
