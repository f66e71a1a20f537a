"""Grids take the place of their runs, and names stay apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lightning_peft.comparison.expand import expand, words_of
from lightning_peft.comparison.schema import Comparison


def comparison(**changes: Any) -> Comparison:
    return Comparison(**{"runs": {"lora": {}}, "folder": "out", **changes})


def test_a_grid_makes_options_of_each_point(tmp_path: Path) -> None:
    grid = {"a": {"model.adapter.p": [0.5, 1], "model.name": ["x/y"]}}
    found = expand(comparison(runs={"a": {"model.adapter": "LoRA"}, "b": {}}, grid=grid), tmp_path)
    assert list(found) == ["a p=0.5 name=x_y", "a p=1 name=x_y", "b"]
    options = ["--model.adapter=LoRA", "--model.name=x/y", "--model.adapter.p=0.5"]
    assert found["a p=0.5 name=x_y"] == options
    assert found["b"] == []


def test_files_are_looked_for_beside_the_comparison_and_then_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside, here = tmp_path / "beside", tmp_path / "here"
    for folder in (beside, here):
        folder.mkdir()
        (folder / "a.yaml").touch()
    (here / "b.yaml").touch()
    monkeypatch.chdir(here)
    words = words_of(["a.yaml", {"x": 1}, "b.yaml"], beside, "runs.r")
    assert words == ["--config", str(beside / "a.yaml"), "--x=1", "--config", str(here / "b.yaml")]
    with pytest.raises(FileNotFoundError, match="runs.r: there is no file c.yaml, neither in"):
        words_of("c.yaml", beside, "runs.r")


def test_two_runs_of_one_name_are_refused(tmp_path: Path) -> None:
    two = comparison(runs={"a p=1": {}, "a": {}}, grid={"a": {"p": [1]}})
    with pytest.raises(ValueError, match="two runs have the name 'a p=1'"):
        expand(two, tmp_path)
    with pytest.raises(ValueError, match="two runs have the name 'LoRA'"):
        expand(comparison(runs={"lora": {}, "LoRA": {}}), tmp_path)


def test_a_grid_without_values_and_a_path_too_long_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="grid.lora.p is empty; give at least one value to try"):
        expand(comparison(grid={"lora": {"p": []}}), tmp_path)
    with pytest.raises(FileNotFoundError, match="runs.lora: there is no file x{120} …, neither"):
        expand(comparison(runs={"lora": "x" * 5000}), tmp_path)


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b"])
def test_what_can_be_no_files_name_is_no_file(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="runs.a: there is no file"):
        words_of(name, tmp_path, "runs.a")
