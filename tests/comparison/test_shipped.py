"""Every shipped comparison is resolved and checked, as its first line says."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from lightning_peft.commands.compare import read_comparison
from lightning_peft.comparison.expand import expand
from lightning_peft.comparison.plan import make_plan
from lightning_peft.settings.resolve import Resolver

ROOT = Path(__file__).parents[2]
SHIPPED = sorted(ROOT.glob("configs/compare/*.yaml"))


# The embedded model, small pretrained ones, and those of the papers.
PRETRAINED = [path for path in SHIPPED if path.stem.startswith("small_")]
SMALL = [path for path in SHIPPED if path.stem.startswith("tiny_")] + PRETRAINED
LARGE = [path for path in SHIPPED if path not in SMALL]


def words_of(path: Path) -> list[str]:
    words = shlex.split(path.read_text().splitlines()[0])[1:]
    assert words[:2] == ["lightning-peft", "compare"]
    return words[2:]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_it_names_files_and_runs_that_are_there(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    comparison, folder, _, _ = read_comparison(words_of(path))
    assert Path(comparison.folder) == Path("runs/compare") / path.stem
    runs = expand(comparison, folder)
    assert {*comparison.baselines, *comparison.baselines.values()} <= runs.keys()
    assert comparison.baseline in (None, *runs)


def marked(path: Path) -> Any:
    """In CI the widest of each kind, and one with a grid; a tree takes a third of a second."""
    often = path.stem in ("tiny_loradrop_ablations", "small_e2e", "all")
    return pytest.param(path, marks=pytest.mark.slow if often else pytest.mark.long, id=path.stem)


@pytest.mark.parametrize("path", list(map(marked, SHIPPED)))
def test_it_is_planned(path: Path, resolver: Resolver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    comparison, folder, extra, _ = read_comparison(words_of(path))
    comparison.match = None  # ranks are chosen below
    plan = make_plan(comparison, folder, extra, resolver)
    assert all(plan.baseline_of(run) in plan.trees for run in plan.trees)
    models = {tree["model"]["init_args"]["model_name_or_path"] for tree in plan.trees.values()}
    if path in LARGE:
        assert not models & {"tiny_llama", "smollm2", "minilm"}
    else:
        assert models <= ({"smollm2", "minilm"} if path in PRETRAINED else {"tiny_llama"})


def test_each_study_has_a_small_one() -> None:
    names = {path.stem for path in SHIPPED if path not in PRETRAINED}
    large = {name for name in names if not name.startswith("tiny_")}
    assert {f"tiny_{name}" for name in large} == names - large - {"tiny_commonsense"}


def methods_in(path: Path) -> set[str]:
    comparison, _, _, _ = read_comparison(words_of(path))
    return {str(settings["model.adapter"]) for settings in comparison.runs.values()}


@pytest.mark.parametrize("size", ["", "tiny_"])
def test_the_comparisons_of_all_methods_and_of_ranks_have_them_all(
    size: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightning_peft import strategies

    monkeypatch.chdir(ROOT)
    ours = {
        name
        for name in strategies.__all__
        if issubclass(getattr(strategies, name), strategies.AdapterStrategy)
    }
    ours -= {"AdapterStrategy", "LoRAPrune"}  # whose base is a smaller one
    folder = ROOT / "configs/compare"
    ranks = methods_in(folder / f"{size}rank_family.yaml")
    assert methods_in(folder / f"{size}all.yaml") | ranks == ours
    assert methods_in(folder / "small_rank_family.yaml") == ranks


@pytest.mark.parametrize(
    ("name", "count"),
    [
        pytest.param("tiny_all", 10, marks=pytest.mark.long),
        pytest.param("tiny_rank_family", 12, marks=pytest.mark.long),
    ],
)
def test_a_comparison_has_methods_at_one_size(
    name: str, count: int, resolver: Resolver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    comparison, folder, extra, _ = read_comparison(words_of(ROOT / f"configs/compare/{name}.yaml"))
    plan = make_plan(comparison, folder, extra, resolver)
    assert all(abs(number / 155_648 - 1) < 0.05 for number in plan.parameters.values())
    assert len(plan.parameters) == count


@pytest.mark.slow
def test_ranks_of_a_large_model_are_found_from_its_configuration(
    resolver: Resolver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    LlamaConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
    ).save_pretrained(tmp_path)
    comparison, folder, extra, _ = read_comparison(words_of(ROOT / "configs/compare/all.yaml"))
    comparison.runs = {name: comparison.runs[name] for name in ("LoRA", "PrunedLoRA")}
    assert comparison.match is not None
    comparison.match.leave, comparison.rates = [], None
    comparison.match.rank_of = {"PrunedLoRA": "model.adapter.target_r"}
    extra = [*extra, "--model.model_name_or_path", str(tmp_path)]
    plan = make_plan(comparison, folder, extra, resolver)
    assert plan.parameters["LoRA"] == plan.parameters["PrunedLoRA"] == 56_098_816
