"""Noise on the weights: its size, that it leaves nothing behind, and what is recorded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_peft.callbacks import WeightPerturbation
from lightning_peft.callbacks.perturbation import noise_on
from lightning_peft.cli import main


def test_noise_has_the_asked_size_and_is_taken_away_to_the_bit() -> None:
    torch.manual_seed(0)
    weights = [
        nn.Parameter(3 * torch.randn(200, 300)),
        nn.Parameter(torch.randn(50, 80).bfloat16()),
    ]
    before = [weight.detach().clone() for weight in weights]
    with noise_on(weights, 0.1, seed=1):
        for weight, old in zip(weights, before, strict=True):
            change = (weight - old).float()
            assert float(change.norm() / old.float().norm()) == pytest.approx(0.1, rel=0.05)
    assert all(torch.equal(w, old) for w, old in zip(weights, before, strict=True))


@pytest.mark.parametrize("arguments", [{"scales": []}, {"scales": [0.0]}, {"draws": 0}])
def test_what_makes_no_sense_is_refused(arguments: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="must be"):
        WeightPerturbation(**arguments)  # type: ignore[arg-type]


def test_a_fit_records_the_loss_under_noise(tmp_path: Path) -> None:
    callback = {
        "class_path": "WeightPerturbation",
        "init_args": {"scales": [0.01, 0.5], "draws": 2},
    }
    main(
        [
            "fit",
            "--config",
            "configs/quickstart.yaml",
            "--trainer.default_root_dir",
            str(tmp_path),
            "--trainer.max_steps=4",
            "--trainer.val_check_interval=2",
            "--trainer.enable_progress_bar=false",
            f"--trainer.callbacks={json.dumps([callback])}",
            "--data.batch_size=8",
            "--data.val_size=50",
            "--validate_first=false",
        ]
    )
    metrics = json.loads((tmp_path / "version_0/run.json").read_text())["metrics"]
    clean = metrics["perturbed_loss/0.01"] - metrics["loss_rise/0.01"]
    assert clean == pytest.approx(metrics["val_loss"], rel=1e-3)
    assert abs(metrics["loss_rise/0.01"]) < metrics["loss_rise/0.5"]
