"""A comparison runs to its end, whatever fails in it, and ends the same when it is killed."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_peft.cli import main
from lightning_peft.comparison.names import names_of
from lightning_peft.comparison.rows import MEASURED
from lightning_peft.datamodules import ArithmeticDataModule
from lightning_peft.modules import CausalLMModule

ROOT = Path(__file__).parents[2]
TIMED = {*MEASURED, "seconds"}


def write(path: Path, base: Path, **changes: Any) -> Path:
    """A comparison of small runs on a small model."""
    common = {
        "trainer.accelerator": "cpu",
        "trainer.max_steps": 6,
        "trainer.val_check_interval": 3,
        "trainer.log_every_n_steps": 1,
        "model.model_name_or_path": str(base),
        "model.optimizer.lr": 1e-2,
        "data.batch_size": 8,
        "data.val_size": 20,
        "data.test_size": 20,
        "importance.every_n_steps": 2,
        "checkpoint.every_n_train_steps": 2,
        "validate_first": False,
    }
    made = {
        "base": [str(ROOT / "configs/quickstart.yaml")],
        "folder": str(path / "out"),
        "overrides": common,
        "seeds": [0],
        "threads": 1,
        "score": "val_loss",
        "runs": {"lora": {"model.adapter": "LoRA", "model.adapter.r": 2}},
        **changes,
    }
    file = path / "comparison.yaml"
    file.write_text(yaml.safe_dump(made, sort_keys=False))
    return file


def table(folder: Path, name: str = "results.csv") -> list[dict[str, str]]:
    """The rows of a file, without what is measured."""
    with (folder / name).open() as file:
        rows = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if k not in TIMED} for row in rows]


def test_a_run_that_fails_is_recorded_and_stops_no_other_and_nothing_is_done_twice(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = {
        "broken": {"model.adapter": "LoRA", "model.optimizer.lr": 1e30},
        "lora": {"model.adapter": "LoRA", "model.adapter.r": 2},
    }
    file = write(tmp_path, base, runs=runs, score="test/average", baseline="lora")
    main(["compare", "--config", str(file)])
    broken, lora = table(tmp_path / "out")
    assert (broken["seeds"], broken["failed"]) == ("0", "1")
    assert (lora["seeds"], lora["failed"], lora["parameters_end"]) == ("1", "0", "2048")
    said = capsys.readouterr().out
    assert "broken/seed=0: failed: the loss is nan at step" in said
    assert "[2/2] lora/seed=0: test/average 0.0000" in said
    result = tmp_path / "out/runs/lora/seed=0/result.json"
    assert json.loads(result.read_text()) == {"status": "done"}

    # What the plan foretold of its metrics is what the run left.
    foretold = names_of(CausalLMModule("tiny_llama"), ArithmeticDataModule())
    run = result.parent / "version_0"
    assert json.loads((run / "run.json").read_text())["metrics"].keys() == set(foretold.all or ())
    columns = set((run / "metrics.csv").read_text().split("\n")[0].split(","))
    assert columns == set(foretold.logged or ())

    written = result.stat().st_mtime_ns
    main(["compare", "--config", str(file)])
    assert result.stat().st_mtime_ns == written
    assert "[2/2]" not in capsys.readouterr().out

    file = write(tmp_path, base, runs=runs, score="test/average", baseline="lora")
    with pytest.raises(SystemExit):
        main(["compare", "--config", str(file), "--trainer.max_steps", "7"])
    said = capsys.readouterr().err
    assert "holds broken/seed=0 with trainer.max_steps = 6, which is 7 now" in said


def _assert_gone(folder: Path) -> None:
    for _ in range(100):
        if not _alive(folder):
            return
        time.sleep(0.1)
    raise AssertionError("workers outlive the process that started them")


def _alive(folder: Path) -> list[int]:
    """Processes whose log lies in a folder."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if os.readlink(entry / "fd/1").startswith(str(folder)):
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("wanted", [2, pytest.param(6, marks=pytest.mark.long)])
def test_killed_again_and_again_it_ends_with_the_same_table(
    wanted: int, base: Path, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {
        "seeds": [0, 1],
        "workers": 2,
        "score": "test/average",
        "also": ["val_loss"],
        "rates": {"values": [1e-2, 3e-3], "choose_by": "val_loss", "best": "lowest"},
        "runs": {
            "pruned": {
                "model.adapter": "PrunedLoRA",
                "model.adapter.r": 6,
                "model.adapter.target_r": 2,
                "model.adapter.prune_every": 3,
                "model.adapter.prune_count": 1,
                "model.adapter.rank_gate": "StepMask",
            },
        },
    }
    folders = [tmp_path / "whole", tmp_path / "killed"]
    files = []
    for folder in folders:
        folder.mkdir()
        files.append(write(folder, base, **changes))
    steps = ["--trainer.max_steps", "24"]
    program = [sys.executable, "-m", "lightning_peft", "compare", "--config"]
    subprocess.run([*program, str(files[0]), *steps], check=True, capture_output=True, timeout=400)

    out = folders[1] / "out"
    kills = 0
    for _ in range(40):
        process = subprocess.Popen([*program, str(files[1]), *steps], stdout=subprocess.DEVNULL)
        before = set(out.glob("runs/**/*.ckpt"))
        deadline = time.monotonic() + 120
        # Kill it once something new was begun: at another place each time.
        while process.poll() is None and time.monotonic() < deadline:
            if len(set(out.glob("runs/**/*.ckpt")) - before) > kills and kills < wanted:
                process.send_signal(signal.SIGKILL)
                kills += 1
                break
            time.sleep(0.02)
        process.wait()
        _assert_gone(out)
        if process.returncode == 0:
            break
    assert kills == wanted
    assert process.returncode == 0
    assert table(out) == table(folders[0] / "out")
    assert table(out, "seeds.csv") == table(folders[0] / "out", "seeds.csv")
