"""A comparison is resolved and checked whole before anything runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lightning_peft.comparison.plan import Job, Plan, make_plan
from lightning_peft.comparison.schema import Comparison, Match, Rates
from lightning_peft.settings.resolve import Resolver

ROOT = Path(__file__).parents[2]
QUICKSTART = str(ROOT / "configs/quickstart.yaml")
LORA = {"model.adapter": "LoRA", "model.adapter.r": 4}


def comparison(**changes: Any) -> Comparison:
    made = {"runs": {"lora": LORA}, "folder": "out", "base": [QUICKSTART], "seeds": [3, 5]}
    return Comparison(**{**made, **changes})


def adapter(plan: Plan, run: str) -> dict[str, Any]:
    return plan.trees[run]["model"]["init_args"]["adapter"]["init_args"]


def test_grid_makes_a_run_of_each_point(resolver: Resolver) -> None:
    drop = {"model.adapter": "DropLoRA"}
    grid = {"drop": {"model.adapter.p": [0.1, 0.25], "model.adapter.r": [2, 4]}}
    plan = make_plan(comparison(runs={"lora": LORA, "drop": drop}, grid=grid), ROOT, (), resolver)
    names = ["drop p=0.1 r=2", "drop p=0.1 r=4", "drop p=0.25 r=2", "drop p=0.25 r=4"]
    assert list(plan.trees) == ["lora", *names]
    assert (adapter(plan, names[2])["p"], adapter(plan, names[2])["r"]) == (0.25, 2)
    assert adapter(plan, "lora")["r"] == 4
    assert plan.baseline_of(names[0]) == "lora"


def test_own_settings_lie_over_the_command_lines_and_those_over_the_base(
    resolver: Resolver,
) -> None:
    runs = {"a": {"data.batch_size": 7}, "b": {}}
    overrides = {"data.batch_size": 5, "trainer": {"max_steps": 9}}
    extra = ["--data.val_size", "11"]
    plan = make_plan(comparison(runs=runs, overrides=overrides), ROOT, extra, resolver)
    sizes = [plan.trees[run]["data"]["init_args"]["batch_size"] for run in runs]
    assert sizes == [7, 5]
    assert plan.trees["a"]["trainer"]["max_steps"] == 9
    assert plan.trees["a"]["data"]["init_args"]["val_size"] == 11
    assert plan.trees["a"]["model"]["init_args"]["warmup_steps"] == 20  # the base's


def test_null_and_a_gates_class_arrive_as_written(resolver: Resolver) -> None:
    gate = {"class_path": "lightning_peft.strategies.RankDropout", "init_args": {"p": 0.25}}
    run = {
        "model.adapter": "PiSSA",
        "model.adapter.rank_gate": gate,
        "model.adapter.lora_alpha": None,
    }
    plan = make_plan(comparison(runs={"a": run}, rates=Rates([1e-3])), ROOT, (), resolver)
    found = adapter(plan, "a")
    assert found["lora_alpha"] is None
    assert found["rank_gate"]["init_args"]["p"] == 0.25
    assert "r" not in found["rank_gate"]["init_args"]
    # And the same when the job's own file is read again.
    settings = plan.settings_of(Job("a", 1e-3, 3))
    assert make_plan(comparison(runs={"a": settings}), ROOT, (), resolver).trees["a"] is not None


def test_a_job_has_its_rate_seed_and_folder(resolver: Resolver) -> None:
    plan = make_plan(comparison(rates=Rates([1e-3, 1e-2])), ROOT, (), resolver)
    settings = plan.settings_of(Job("lora", 1e-2, 5))
    assert settings["seed_everything"] == 5
    assert settings["model"]["init_args"]["optimizer"]["init_args"]["lr"] == 1e-2
    assert settings["trainer"]["default_root_dir"].endswith("out/runs/lora/rate=0.01/seed=5")
    assert [(job.rate, job.seed) for job in plan.sweep("lora")] == [(1e-3, 3), (1e-2, 3)]
    assert plan.count() == 3  # two rates with the first seed, the better one with the second


def test_a_run_may_be_swept_over_values_of_its_own(resolver: Resolver) -> None:
    rates = Rates([1e-3], values_of={"b": [1e-2, 1e-1]}, seeds=[3, 4])
    plan = make_plan(comparison(runs={"a": LORA, "b": LORA}, rates=rates), ROOT, (), resolver)
    assert [(job.rate, job.seed) for job in plan.sweep("b")] == [
        (1e-2, 3),
        (1e-2, 4),
        (1e-1, 3),
        (1e-1, 4),
    ]


def test_steps_and_seconds_are_the_trainers(resolver: Resolver) -> None:
    steps = make_plan(comparison(match=Match(steps=12)), ROOT, (), resolver)
    assert steps.trees["lora"]["trainer"]["max_steps"] == 12
    seconds = make_plan(comparison(match=Match(seconds=3725)), ROOT, (), resolver)
    assert seconds.trees["lora"]["trainer"]["max_time"] == "00:01:02:05"


def test_parameters_are_matched_by_the_rank_at_the_end(resolver: Resolver) -> None:
    runs = {
        "lora": {"model.adapter": "LoRA"},
        "pruned": {"model.adapter": "PrunedLoRA", "model.adapter.r": 32},
        "sparse": {"model.adapter": "SparseAdapter"},
        "full": {"model.adapter": "FullFineTuning"},
    }
    match = Match(parameters=77824, rank_of={"pruned": "model.adapter.target_r"}, leave=["full"])
    plan = make_plan(comparison(runs=runs, match=match), ROOT, (), resolver)
    # 9,728 values a rank: rank 8 throughout, at the end, and of which half is masked.
    assert adapter(plan, "lora")["r"] == 8
    assert (adapter(plan, "pruned")["r"], adapter(plan, "pruned")["target_r"]) == (32, 8)
    assert adapter(plan, "sparse")["r"] == 16
    assert plan.parameters == {"lora": 77824, "pruned": 77824, "sparse": 77824}


def test_what_runs_are_judged_by_is_their_datas_first_score(resolver: Resolver) -> None:
    plan = make_plan(comparison(rates=Rates([1e-3])), ROOT, (), resolver)
    assert (plan.score, plan.comparison.curve) == ("test/average", "val_accuracy")
    assert str(plan).endswith("chosen by val_accuracy\njudged by test/average")
    glue = {"model": "SequenceClassificationModule", "data": "GlueDataModule"}
    runs = {task: {**glue, "data.task": task} for task in ("rte", "mnli")}
    plan = make_plan(comparison(runs={"rte": runs["rte"]}), ROOT, (), resolver)
    assert (plan.score, plan.comparison.curve) == ("test/rte/accuracy", "val_score")
    with pytest.raises(ValueError, match=r"no common one, since their data differ \(rte \(Glue"):
        make_plan(comparison(runs=runs), ROOT, (), resolver)
    plan = make_plan(comparison(runs=runs, score="test/rte/accuracy"), ROOT, (), resolver)
    assert plan.notes == ["score: test/rte/accuracy is not a metric of mnli."]


def test_a_data_module_that_cannot_be_made_is_one_sentence(resolver: Resolver) -> None:
    run = {**LORA, "data.train_size": 0}
    with pytest.raises(ValueError, match=r"^runs.lora: data.train_size") as caught:
        make_plan(comparison(runs={"lora": run}), ROOT, (), resolver)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"runs": {}}, "runs is empty"),
        ({"runs": {"a/b": {}}}, "runs.a/b: a run's name is a folder"),
        ({"seeds": [1, 1]}, "seeds must be different numbers"),
        ({"workers": 0}, "workers must be at least 1, got 0"),
        ({"grid": {"lor": {}}}, "grid.lor is no run; did you mean lora?"),
        ({"baseline": "loro"}, "baseline: 'loro' is no run; did you mean lora?"),
        ({"match": Match(leave=["x"], steps=3)}, "match.leave: 'x' is no run; there are lora."),
        ({"match": Match()}, "match needs one of parameters, steps and seconds"),
        ({"base": ["no.yaml"]}, "base: there is no file no.yaml"),
        (
            {"score": "test/avarage"},
            "score: no run will have 'test/avarage'; there are rank",
        ),
        ({"curve": "x"}, "curve: no run will have 'x'; there are epoch, grad_norm, lr, rank, step"),
        (
            {"rates": Rates([0.1], choose_by="test/average")},
            "rates.choose_by: no run will have 'test/average'; there are rank, tokens_per_second",
        ),
        ({"rates": Rates([])}, "rates.values must be different numbers"),
        (
            {"runs": {"lora": {"model.adapter.rank": 3}}},
            "runs.lora: model.adapter.rank is no argument of DropLoRA; did you mean",
        ),
        (
            {"rates": Rates([0.1], key="model.optimizer.rate")},
            "runs.lora: model.optimizer.rate is no argument of AdamW",
        ),
        (
            {"match": Match(parameters=80_000, tolerance=0.01)},
            "no model.adapter.r gives lora 80,000 trainable parameters within 1%; "
            "model.adapter.r = 8 has 77,824 and model.adapter.r = 9 has 87,552",
        ),
        (
            {"runs": {"l": {"model.adapter": "LoRADrop"}}, "match": Match(parameters=80_000)},
            "how many parameters train at the end of l is for its data to decide",
        ),
    ],
)
def test_what_is_wrong_is_one_sentence(
    changes: dict[str, Any], sentence: str, resolver: Resolver
) -> None:
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        make_plan(comparison(**changes), ROOT, (), resolver)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)
