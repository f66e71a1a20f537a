"""Rank correlations of layers' importance, against values worked out by hand."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def agreement() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "agreement.py"
    spec = importlib.util.spec_from_file_location("agreement", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def table(*values: float) -> str:
    rows = [f"9,l{i},q,8,{value},0,output" for i, value in enumerate(values)]
    return "\n".join(
        ["step,layer,kind,rank,importance,share,measure", "0,l0,q,8,77,0,output", *rows]
    )


def test_the_last_step_counts_and_layers_are_ranked_within_a_kind(agreement: ModuleType) -> None:
    one = agreement.importance_of(table(1, 2, 3, 4))
    assert one == {"q": {"l0": 1, "l1": 2, "l2": 3, "l3": 4}}
    # 1 - 6 (0 + 0 + 1 + 1) / (4 * 15)
    assert agreement.correlation(one, agreement.importance_of(table(10, 20, 40, 30))) == (
        pytest.approx(0.8)
    )
    two = {**one, "v": {"a": 1.0, "b": 2.0, "c": 3.0}}
    turned = {**one, "v": {"a": 3.0, "b": 2.0, "c": 1.0}}
    assert agreement.correlation(two, turned) == pytest.approx(0.0)  # 1 and -1 over two kinds


def test_seeds_are_paired_and_the_interval_holds_the_mean(agreement: ModuleType) -> None:
    runs = {
        seed: agreement.importance_of(table(*values))
        for seed, values in enumerate([(1, 2, 3, 4), (1, 2, 4, 3), (1, 2, 3, 4)])
    }
    mean, low, high = agreement.between_seeds(runs)
    assert mean == pytest.approx((0.8 + 1 + 0.8) / 3)
    assert low <= mean <= high
    # Rows at unlike seeds: the same three correlations, and never a seed with itself.
    assert agreement.between_rows(runs, runs)[0] == pytest.approx(mean)


def test_a_packed_comparison_is_a_table(
    agreement: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines = [
        {
            "run": f"{row}/rate=0.001/seed={seed}",
            "result": {"status": "done"},
            "files": {"importance.csv": table(1, 2, 3, 4 + seed)},
        }
        for row in ("LoRA", "drop")
        for seed in range(3)
    ]
    (tmp_path / "some.jsonl").write_text("\n".join(map(json.dumps, lines)))
    monkeypatch.setattr(agreement, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["agreement.py", "some"])
    agreement.main()
    said = capsys.readouterr().out
    assert "| LoRA | 3 | 1.00 (1.00 to 1.00) |  |" in said
    assert "| drop | 3 | 1.00 (1.00 to 1.00) | 1.00 (1.00 to 1.00) |" in said
