"""Classifiers through the command line, with the shipped protocol's callbacks."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from transformers import AutoModelForSequenceClassification

from lightning_peft.cli import main
from lightning_peft.datamodules.glue.module import GlueDataModule

ROOT = Path(__file__).parents[2]


class Scripted(Metric):
    """A score that says what it is told to."""

    values = (0.1, 0.5, 0.3, 0.2, 0.4, 0.9, 0.9)
    given: list[float] = []

    def update(self, *args: Tensor) -> None: ...

    def compute(self) -> Tensor:
        self.given.append(self.values[len(self.given)])
        return torch.tensor(self.given[-1])


def write_config(
    path: Path, base: Path, glue: Path, task: str, adapter: dict[str, Any], **trainer: Any
) -> Path:
    protocol = yaml.safe_load((ROOT / "configs/families/glue/protocol.yaml").read_text())
    callbacks = protocol["trainer"]["callbacks"]
    callbacks[0]["init_args"]["patience"] = 3
    protocol["trainer"] |= {
        "accelerator": "cpu",
        "default_root_dir": str(path / "runs"),
        "enable_progress_bar": False,
        "num_sanity_val_steps": 0,
        **trainer,
    }
    protocol["model"]["init_args"] |= {"model_name_or_path": str(base), "adapter": adapter}
    protocol["data"]["init_args"] |= {
        "task": task,
        "data_dir": str(glue),
        "max_length": 120,
        "batch_size": 8,
        "cache_dir": str(path / "cache"),
    }
    file = path / "config.yaml"
    file.write_text(yaml.safe_dump(protocol))
    return file


def test_the_best_checkpoint_is_kept_and_training_stops(
    bases: dict[str, Path], glue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["lightning-peft"])
    adapter = {"class_path": "LoRA", "init_args": {"r": 2, "target_modules": ["query", "value"]}}
    config = write_config(tmp_path, bases["roberta"], glue, "sst2", adapter)
    Scripted.given = []
    with monkeypatch.context() as patch:
        patch.setattr(
            GlueDataModule, "metrics", lambda self: MetricCollection({"accuracy": Scripted()})
        )
        main(["fit", "--config", str(config)])
    run = tmp_path / "runs" / "version_0"
    # The second of the validations, one after each epoch of three steps, is the best; three more
    # without a better one end the run.
    assert Scripted.given == [0.1, 0.5, 0.3, 0.2, 0.4]
    rows = list(csv.DictReader((run / "metrics.csv").open()))
    scores = {int(row["step"]): float(row["val_score"]) for row in rows if row["val_score"]}
    assert list(scores.values()) == pytest.approx(Scripted.given)
    best = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
    assert best["global_step"] == 6
    assert json.loads((run / "run.json").read_text())["steps"] == 15
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["best.ckpt", "step=15.ckpt"]
    last = torch.load(run / "checkpoints" / "step=15.ckpt", weights_only=True)
    head = "model.classifier.out_proj.weight"
    assert not torch.equal(best["state_dict"][head], last["state_dict"][head])
    # It is tested and exported by its name, without the trainer that knew the classes.
    checkpoint = str(run / "checkpoints" / "best.ckpt")
    main(["test", "--config", str(config), "--ckpt_path", checkpoint])
    record = json.loads((run / "run.json").read_text())
    assert 0 <= record["metrics"]["test/sst2/accuracy"] <= 1
    assert record["test_protocol"] == "glue"
    assert len((run / "predictions" / "sst2.jsonl").read_text().splitlines()) == 24
    main(["export", "--ckpt_path", checkpoint, "--output", str(tmp_path / "best")])
    exported = load_file(tmp_path / "best" / "adapter_model.safetensors")
    key = "base_model.model.classifier.out_proj.weight"
    assert torch.equal(exported[key], best["state_dict"][head])


def test_lora_drop_lays_out_query_and_value_and_exports_a_score(
    bases: dict[str, Path], glue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["lightning-peft"])
    arguments = {
        "r": 4,
        "threshold": 0.6,
        "sample_ratio": 0.5,
        "probe_epochs": 2,
        "target_modules": ["query", "value"],
    }
    adapter = {"class_path": "LoRADrop", "init_args": arguments}
    config = write_config(
        tmp_path, bases["roberta"], glue, "stsb", adapter, max_steps=8, max_epochs=-1
    )
    main(["fit", "--config", str(config), "--data.batch_size", "4"])
    run = tmp_path / "runs" / "version_0"
    layout = json.loads((run / "layout.json").read_text())
    kinds = {"query", "value"}
    names = [f"roberta.encoder.layer.{i}.attention.self.{k}" for i in range(3) for k in kinds]
    assert set(layout) == set(names)
    for kind in kinds:
        own = [entry for name, entry in layout.items() if name.endswith(kind)]
        kept = [entry["share"] for entry in own if entry["role"] == "kept"]
        assert 1 <= len(kept) < 3
        assert sum(kept) >= 0.6
        assert {entry["role"] for entry in own} == {"kept", "shared"}
        assert sum(entry["share"] for entry in own) == pytest.approx(1)
    record = json.loads((run / "run.json").read_text())
    assert record["metrics"].keys() >= {"val_loss", "val_score", "val_spearman", "val_pearson"}
    assert record["protocol"] == "glue"
    # A head of one output, though the model's own configuration says two.
    main(["export", "--ckpt_path", str(run), "--output", str(tmp_path / "merged"), "--merge"])
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert merged.classifier.out_proj.out_features == merged.config.num_labels == 1
    assert merged.config.problem_type == "regression"
    adapter_file = load_file(run / "adapter" / "adapter_model.safetensors")
    head = "classifier.out_proj.weight"
    assert torch.equal(merged.state_dict()[head], adapter_file[f"base_model.model.{head}"])
