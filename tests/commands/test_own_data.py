"""Ten lines of one's own data and a short configuration train, and are tested."""

from __future__ import annotations

import csv
import json
import re
import sys
from pathlib import Path

import pytest

from lightning_peft.cli import main

PAGE = Path(__file__).parents[2] / "docs" / "tasks.md"
SHIPPED = Path(__file__).parents[2] / "configs" / "families" / "instruction" / "tiny.yaml"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with ``my.jsonl``, ten lines long."""
    monkeypatch.setattr(sys, "argv", ["lightning-peft"])
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    records = [{"instruction": f"Say {word}.", "output": word} for word in "abcdefghij"]
    (tmp_path / "my.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return tmp_path


def test_ten_lines_train_with_the_pages_configuration(folder: Path) -> None:
    shown = re.findall(r"^```yaml\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)[0]
    assert len(shown.splitlines()) < 15
    (folder / "my.yaml").write_text(shown)
    run = folder / "runs" / "version_0"
    options = ["--trainer.accelerator", "cpu", "--trainer.max_epochs", "8"]
    optimizer = ["--model.optimizer.lr", "0.01", "--trainer.log_every_n_steps", "5"]
    main(["fit", "--config", "my.yaml", *options, *optimizer])
    assert (run / "adapter" / "adapter_model.safetensors").is_file()
    record = json.loads((run / "run.json").read_text())
    assert (record["steps"], record["protocol"], record["status"]) == (40, "alpaca", "finished")
    with (run / "metrics.csv").open() as file:
        losses = [float(row["train_loss"]) for row in csv.DictReader(file) if row["train_loss"]]
    assert losses[-1] < losses[0] / 2
    test = ["--data.test_file", "my.jsonl", "--data.max_new_tokens", "4", "--ckpt_path", "last"]
    main(["test", "--config", "my.yaml", *test])
    lines = [json.loads(x) for x in (run / "predictions" / "my.jsonl").read_text().splitlines()]
    assert [line["expected"] for line in lines] == list("abcdefghij")
    scores = json.loads((run / "run.json").read_text())["metrics"]
    assert {"test/my/accuracy", "test/my/rougeL"} <= scores.keys()


def test_the_shipped_configuration_is_short_too() -> None:
    lines = [x for x in SHIPPED.read_text().splitlines() if not x.startswith("#")]
    assert len(lines) < 15
