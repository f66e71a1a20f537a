"""Runs of a comparison that are kept as lines, and made folders again."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from lightning_peft.comparison.outcomes import read_outcome


@pytest.fixture(scope="module")
def pretrained() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "pretrained.py"
    spec = importlib.util.spec_from_file_location("pretrained", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make(folder: Path, status: str) -> None:
    version = folder / "version_0"
    version.mkdir(parents=True)
    settings = {
        "trainer": {"default_root_dir": str(folder), "max_steps": 3},
        "model": {"init_args": {"model_name_or_path": "minilm"}},
    }
    (folder / "settings.yaml").write_text(yaml.safe_dump(settings))
    (folder / "result.json").write_text(json.dumps({"status": status}))
    record = {"model": "/there/minilm", "exported": "/there", "metrics": {"test/loss": 0.5}}
    (version / "run.json").write_text(json.dumps({**record, "parameters": {"start": 9, "end": 7}}))
    (version / "metrics.csv").write_text("step\n1\n")


def test_what_is_packed_comes_back_elsewhere_and_nothing_is_overwritten(
    pretrained: ModuleType, tmp_path: Path
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    make(first / "runs" / "LoRA" / "rate=0.001" / "seed=0", "done")
    make(first / "runs" / "LoRA" / "rate=0.01" / "seed=0", "fitted")
    (first / "runs" / "LoRA" / "rate=0.01" / "seed=1").mkdir()  # has not come to an end
    lines = list(pretrained.packed(first))
    assert str(tmp_path) not in json.dumps(lines)
    assert "/there" not in json.dumps(lines)
    assert pretrained.unpack(lines, second) == 2
    for rate in ("0.001", "0.01"):
        was, found = (
            read_outcome(folder / "runs" / "LoRA" / f"rate={rate}" / "seed=0")
            for folder in (first, second)
        )
        assert was is not None
        assert found is not None
        assert (found.status, found.metrics, found.start, found.end) == (
            was.status,
            {"test/loss": 0.5},
            9,
            7,
        )
    run = second / "runs" / "LoRA" / "rate=0.001" / "seed=0"
    settings = yaml.safe_load((run / "settings.yaml").read_text())
    assert settings["trainer"] == {"default_root_dir": str(run), "max_steps": 3}
    assert (run / "version_0" / "metrics.csv").read_text() == "step\n1\n"
    assert pretrained.unpack(lines, second) == 0
