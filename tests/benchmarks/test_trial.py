"""Each stage of a trial on a GPU runs here on small shapes, and leaves its files in time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
TRIAL = ROOT / "benchmarks" / "gpu" / "trial.sh"


def trial(folder: Path, *words: str, **more: str) -> tuple[int, dict[str, object]]:
    """The exit status, and what the stage says of itself."""
    own = {"OUT": str(folder), "PYTHON": sys.executable, "TINY": "1", "OMP_NUM_THREADS": "1"}
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, **own, "PYTHONPATH": path, **more}
    done = subprocess.run([TRIAL, *words], env=env, capture_output=True, text=True, timeout=500)
    told = (folder / f"{words[0]}.json").read_text()
    assert told == done.stdout[-len(told) :]
    return done.returncode, json.loads(told)


@pytest.mark.slow
def test_right_runs_the_tests_marked_gpu(tmp_path: Path) -> None:
    status, told = trial(tmp_path, "right", "400")
    assert (status, told["status"]) == (0, "finished"), (tmp_path / "right.log").read_text()
    suite = ElementTree.parse(tmp_path / "right.xml").getroot()[0]
    counts = {key: int(suite.attrib[key]) for key in ("tests", "failures", "errors", "skipped")}
    assert counts["failures"] == counts["errors"] == 0
    assert counts["tests"] - counts["skipped"] >= 10


@pytest.mark.slow
def test_fast_measures_every_case_beside_pefts(tmp_path: Path) -> None:
    status, told = trial(tmp_path, "fast", "300")
    assert (status, told["status"]) == (0, "finished"), (tmp_path / "fast.log").read_text()
    (line,) = (tmp_path / "fast.jsonl").read_text().splitlines()
    rows = {row["case"]: row for row in json.loads(line)["rows"]}
    assert {"floor", "LoRA", "PEFT LoRA", "DropLoRA step", "LoRA-drop", "PEFT DoRA"} <= rows.keys()
    assert all(row["tokens_per_second"] > 0 for row in rows.values())
    assert rows["LoRA"]["trained"] == rows["PEFT LoRA"]["trained"]
    assert rows["PrunedLoRA, at its end"]["trained"] == rows["LoRA"]["trained"]
    assert rows["PrunedLoRA, 4 r"]["trained"] == 4 * rows["LoRA"]["trained"]
    assert rows["LoRA-drop"]["trained"] <= rows["LoRA"]["trained"]


@pytest.mark.long
def test_true_leaves_the_runs_that_came_to_an_end(base: Path, tmp_path: Path) -> None:
    settings = {
        "base": [str(ROOT / "configs/quickstart.yaml")],
        "overrides": {
            **{"trainer.accelerator": "auto", "trainer.max_steps": 4, "data.test_size": 8},
            **{"trainer.val_check_interval": 4, "trainer.log_every_n_steps": 1},
            **{"model.model_name_or_path": str(base), "data.val_size": 8},
        },
        "seeds": [0],
        "threads": 1,
        "score": "val_loss",
        "runs": {"lora": {"model.adapter": "LoRA"}, "drop": {"model.adapter": "DropLoRA"}},
    }
    (tmp_path / "trial.yaml").write_text(yaml.safe_dump(settings))
    runs = str(tmp_path / "compared")
    status, told = trial(
        tmp_path, "true", "300", str(tmp_path / "trial.yaml"), WORKERS="1", RUNS=runs
    )
    assert (status, told["status"]) == (0, "finished"), (tmp_path / "true.log").read_text()
    lines = (tmp_path / "trial.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["run"] for line in lines) == ["drop/seed=0", "lora/seed=0"]
    # A comparison by val_loss tests nothing.
    assert all(json.loads(line)["result"] == {"status": "fitted"} for line in lines)


def test_a_stage_whose_time_is_up_is_no_failure(tmp_path: Path) -> None:
    status, told = trial(tmp_path, "fast", "1")
    assert (status, told["status"]) == (0, "its time was up")
    assert (tmp_path / "fast.log").is_file()


def test_an_unknown_stage_is_refused(tmp_path: Path) -> None:
    done = subprocess.run([TRIAL, "quick", "10"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert "quick is no stage; there are right, fast and true" in done.stderr
