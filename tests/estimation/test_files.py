"""Sizes of files against the files that are written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightning_peft.adapters import save_peft
from lightning_peft.cli import main
from lightning_peft.estimation.files import checkpoint_bytes, export_bytes
from lightning_peft.strategies import FullFineTuning, GaLore, LoRA, LoRAPrune, PiSSA


def test_each_tensor_of_a_checkpoint_costs_its_values_and_a_little() -> None:
    kept, state = [torch.zeros(100)], [torch.zeros(100), torch.zeros(())]
    one = checkpoint_bytes(kept, state)
    two = checkpoint_bytes([*kept, torch.zeros(1000)], state)
    assert one > 4 * 201
    assert 4000 < two - one < 4000 + 512
    assert checkpoint_bytes([*kept, kept[0]], state) - one < 512  # shared storage counts once


def test_a_file_of_weights_is_what_safetensors_writes(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model = torch.nn.Linear(64, 32)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    written = (tmp_path / "model.safetensors").stat().st_size
    assert export_bytes(model) == pytest.approx(written, abs=32)


@pytest.mark.parametrize("name", ["DropLoRA", "DoRA", "PiSSA", "VeRA", "TiedLoRA", "SparseAdapter"])
def test_export_is_what_is_written(name: str, strategy, estimated, real, tmp_path: Path) -> None:
    module = real(strategy(name))
    save_peft(module.model, tmp_path)
    size = (tmp_path / "adapter_model.safetensors").stat().st_size
    found = estimated(strategy(name))
    assert found.export == pytest.approx(size, rel=0.02)


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("PiSSA", "GaLore")]


@pytest.mark.parametrize("name", ["LoRA", "FullFineTuning", *SLOW])
def test_a_checkpoint_is_what_a_run_writes(name: str, estimated, tmp_path: Path) -> None:
    words = ["fit", "--config", str(Path(__file__).parents[2] / "configs/quickstart.yaml")]
    settings = {
        "trainer.default_root_dir": str(tmp_path),
        "trainer.max_steps": 2,
        "trainer.limit_val_batches": 0,
        "trainer.enable_progress_bar": False,
        "validate_first": False,
        "data.batch_size": 4,
        "model.adapter": name,
        **({} if name == "FullFineTuning" else {"model.adapter.r": 16}),
    }
    assert main([*words, *(f"--{key}={value}" for key, value in settings.items())]) in (0, None)
    (written,) = tmp_path.glob("version_0/checkpoints/*.ckpt")
    adapter = {"LoRA": LoRA, "PiSSA": PiSSA, "GaLore": GaLore, "FullFineTuning": FullFineTuning}
    made = adapter[name](**({} if name == "FullFineTuning" else {"r": 16}))
    found = estimated(made)
    assert found.checkpoint == pytest.approx(written.stat().st_size, rel=0.1)


def test_what_pefts_format_cannot_hold_has_no_size(tiny_llama) -> None:
    strategy = LoRAPrune(r=2)
    strategy.attach(model := tiny_llama())
    assert export_bytes(model) is not None
    strategy.final_parameters(model)
    assert export_bytes(model) is None
