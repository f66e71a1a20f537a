"""The words of a comparison are its own, or fit's."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from lightning_peft.commands.compare import read_comparison
from lightning_peft.comparison.schema import Match, Rates

SETTINGS = {
    "folder": "out",
    "runs": {
        "a": {"model.adapter": {"class_path": "PiSSA", "init_args": {"rank_gate": "RankDropout"}}},
        "b": ["b.yaml", {"model.adapter.r": 4}],
    },
    "rates": {"values": [0.1, 0.2], "best": "lowest"},
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(SETTINGS))
    return path


def test_options_of_fit_are_set_apart(file: Path) -> None:
    words = ["--config", str(file), "--trainer.max_steps", "3", "--seeds", "[1, 2]"]
    words += ["--data.data_dir=D", "--plan_only", "true"]
    comparison, folder, extra, options = read_comparison(words)
    assert extra == ["--trainer.max_steps", "3", "--data.data_dir=D"]
    assert folder == file.parent
    assert comparison.seeds == [1, 2]
    assert (options.plan_only, options.table_only, options.retry_failed) == (True, False, False)


def test_runs_stay_as_they_are_written_and_groups_become_objects(file: Path) -> None:
    comparison, *_ = read_comparison(["-c", str(file), "--match.steps", "5"])
    assert comparison.runs == SETTINGS["runs"]
    assert comparison.rates == Rates([0.1, 0.2], best="lowest")
    assert comparison.match == Match(steps=5)


def test_a_wrong_key_is_one_sentence(file: Path) -> None:
    with pytest.raises(ValueError, match="sed is unknown; did you mean seeds?"):
        read_comparison(["--config", str(file), "--sed", "[1]"])
