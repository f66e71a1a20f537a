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


RESULTS = (
    "run,score,seeds,mean,low,high,difference,difference_low,difference_high,inside_noise,"
    "parameters_end\n"
    "LoRA,test/loss,5,0.40181,0.39459,0.40786,,,,,74498\n"
    "half,test/loss,5,0.43810,0.42302,0.46040,0.03630,0.02210,0.05310,false,37634\n"
    "drop,test/loss,5,0.40650,0.39800,0.42610,0.00469,-0.00701,0.02000,true,47464\n"
    "drop,test/sst2/accuracy,5,0.81,0.80,0.82,,,,,47464\n"
    "one,test/loss,1,0.42780,0.42780,0.42780,0.02,0.02,0.02,,37634\n"
    "none,test/loss,0,,,,,,,,\n"
)


def test_the_short_table_has_losses_of_rows_with_five_seeds(pretrained: ModuleType) -> None:
    assert pretrained.short_table(RESULTS).splitlines()[2:] == [
        "| LoRA | 0.402 (0.395 to 0.408) |  | 74,498 |",
        "| half | 0.438 (0.423 to 0.460) | +0.036 (+0.022 to +0.053) | 37,634 |",
        "| drop | 0.406 (0.398 to 0.426) | +0.005 (-0.007 to +0.020), inside the noise | 47,464 |",
    ]


def test_a_table_takes_the_place_of_the_one_before(pretrained: ModuleType, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n\n<!-- a -->\n<!-- /a -->\n\nafter\n")
    for text in ("one", "two"):
        pretrained.insert(page, "a", text)
        pretrained.insert(page, "b", "of another page")
    assert page.read_text() == "before\n\n<!-- a -->\n\ntwo\n\n<!-- /a -->\n\nafter\n"


@pytest.mark.slow
def test_pages_show_what_the_kept_runs_give(pretrained: ModuleType, tmp_path: Path) -> None:
    pretrained.judge("small_loradrop_sst2", tmp_path)
    docs, readme = (
        (pretrained.ROOT / name).read_text() for name in ("docs/pretrained.md", "README.md")
    )
    assert (tmp_path / "results.md").read_text().strip() in docs
    assert pretrained.short_table((tmp_path / "results.csv").read_text()) in readme
