"""The files of configs/trainer, laid over the quickstart and run as a user runs them."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_peft.cli import main

ROOT = Path(__file__).parents[2]


def run(*words: str) -> str:
    """What a command says, which has to end well."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RANK", "LOCAL_", "MASTER_"))}
    own = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "lightning_peft", *words]
    done = subprocess.run(command, cwd=ROOT, env={**kept, **own}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "file",
    [
        "deepspeed_z2",
        *(pytest.param(name, marks=pytest.mark.long) for name in ("ddp", "deepspeed_z3", "fsdp")),
    ],
)
def test_fit_test_and_export_on_two_processes(
    file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "deepspeed" in file and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    files = ("configs/quickstart.yaml", f"configs/trainer/{file}.yaml")
    words = [word for path in files for word in ("--config", path)]
    words += ["--trainer.accelerator", "cpu", "--trainer.devices", "2"]
    words += ["--trainer.default_root_dir", str(tmp_path), "--validate_first", "false"]
    run("fit", *words, "--trainer.max_steps", "12", "--importance.every_n_steps", "4")
    folder = tmp_path / "version_0"
    record = json.loads((folder / "run.json").read_text())
    assert record["status"] == "finished"
    assert (folder / "adapter" / "adapter_model.safetensors").exists()
    steps = {row.split(",")[0] for row in (folder / "importance.csv").read_text().splitlines()[1:]}
    assert len(steps) == 3
    said = run("test", *words, "--ckpt_path", "last", "--trainer.limit_test_batches", "1")
    assert "average" in said
    monkeypatch.setattr(sys, "argv", ["lightning-peft"])
    main(["export", "--ckpt_path", str(folder), "--output", str(tmp_path / "peft")])
    assert (tmp_path / "peft" / "adapter_config.json").exists()
