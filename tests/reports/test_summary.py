from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_peft.reports import report

IMPORTANCE = """step,layer,kind,rank,importance,share,measure
0,l.0.q,q,8,0,0,output
0,l.1.q,q,8,0,0,output
50,l.0.q,q,8,1,0.25,output
50,l.1.q,q,6,3,0.75,output
50,l.2"""


def write_run(folder: Path) -> None:
    record = {
        "strategy": "PrunedLoRA",
        "parameters": {"start": 20_000, "end": 9_000, "total": 1_000_000},
        "ranks": {"l.0.q": 8, "l.1.q": 6},
        "seconds": 12.3456,
        "metrics": {"val_accuracy": 0.815},
    }
    (folder / "run.json").write_text(json.dumps(record))
    (folder / "metrics.csv").write_text("step,train_loss,val_loss\n0,2.0,\n9,,1.5\n10,1.")
    (folder / "importance.csv").write_text(IMPORTANCE)


def test_the_page_tells_strategy_parameters_metrics_and_layers(tmp_path: Path) -> None:
    write_run(tmp_path)
    text = report(tmp_path)
    assert text == (tmp_path / "report.md").read_text()
    assert "PrunedLoRA" in text
    assert "20,000 at the start, 9,000 at the end, of 1,000,000 in all" in text
    assert "6 to 8, mean 7 in 2 layers" in text
    assert "| val_accuracy | 0.815 |" in text
    assert "| q | 2 | l.1.q (75.0%, rank 6) | l.0.q (25.0%, rank 8) |" in text
    assert (tmp_path / "importance.png").is_file()
    assert (tmp_path / "curves.png").is_file()


def test_an_empty_record_is_enough_and_metrics_then_come_from_the_table(tmp_path: Path) -> None:
    write_run(tmp_path)
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "importance.csv").unlink()
    text = report(tmp_path)
    assert "| val_loss | 1.5 |" in text
    assert "LayerImportance" in text


@pytest.mark.parametrize("name", ["run.json", "metrics.csv"])
def test_a_missing_file_is_named_with_what_makes_it(tmp_path: Path, name: str) -> None:
    write_run(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=rf"{name} does not exist; .*fit"):
        report(tmp_path)
    assert not (tmp_path / "report.md").exists()


def test_what_is_not_a_run_is_refused_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        report(tmp_path / "nowhere")
    write_run(tmp_path)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ValueError, match=r"run\.json is not JSON"):
        report(tmp_path)
    write_run(tmp_path)
    (tmp_path / "importance.csv").write_text("step,layer\n0,a\n")
    with pytest.raises(ValueError, match=r"importance\.csv, line 2: expected step"):
        report(tmp_path)


def test_importing_reports_does_not_import_matplotlib() -> None:
    code = "import lightning_peft.reports, sys; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
