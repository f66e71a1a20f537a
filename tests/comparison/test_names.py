"""What runs will be judged by is known, or refused, before they run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from lightning_peft.comparison.names import Names, names_of, resolve_names
from lightning_peft.comparison.schema import Comparison, Rates
from lightning_peft.datamodules import (
    ArithmeticDataModule,
    CodeDataModule,
    CommonsenseDataModule,
    ConversationDataModule,
    E2EDataModule,
    GlueDataModule,
    InstructionDataModule,
    LabelledDataModule,
    MathDataModule,
    TextDataModule,
)
from lightning_peft.modules import CausalLMModule, SequenceClassificationModule

STEP = ("train_loss", "rank", "tokens_per_second")


def causal() -> Any:
    return CausalLMModule("tiny_llama")


def classifier() -> Any:
    return SequenceClassificationModule("tiny_llama")


@pytest.mark.parametrize(
    ("data", "names", "first"),
    [
        (ArithmeticDataModule("operators"), ("reversed", "average"), "average"),
        (ConversationDataModule(), (), None),
        (InstructionDataModule("d", test_file="a/b.json"), ("b/accuracy", "b/rougeL"), "average"),
        (E2EDataModule(), ("e2e/bleu", "e2e/rougeL"), "average"),
        (CodeDataModule(None, tasks=["mbpp"]), ("mbpp", "average"), "average"),
        (CommonsenseDataModule("d", tasks=["boolq", "piqa"]), ("boolq", "piqa"), "average"),
        (MathDataModule("d", "llm_adapters", tasks=["SVAMP", "AQuA"]), ("SVAMP", "AQuA"), None),
    ],
)
def test_a_text_task_is_judged_by_the_average_of_its_tasks(
    data: Any, names: tuple[str, ...], first: str | None
) -> None:
    found = names_of(causal(), data)
    assert found.test is not None
    assert {f"test/{name}" for name in names} <= set(found.test)
    assert found.first == (None if isinstance(data, ConversationDataModule) else "test/average")
    assert found.fit == ("val_accuracy", "val_loss", *STEP)
    assert found.data == type(data).__name__


@pytest.mark.parametrize(
    ("task", "test", "by_set"),
    [
        ("rte", ["test/rte/accuracy", "test/rte/loss"], []),
        ("cola", ["test/cola/matthews", "test/cola/accuracy", "test/cola/loss"], []),
        ("stsb", ["test/stsb/spearman", "test/stsb/pearson", "test/stsb/loss"], []),
        (
            "mnli",
            [f"test/mnli_{p}/{m}" for p in ("matched", "mismatched") for m in ("accuracy", "loss")],
            ["val_accuracy_mnli_matched", "val_accuracy_mnli_mismatched"],
        ),
    ],
)
def test_classes_are_judged_by_the_first_metric(
    task: str, test: list[str], by_set: list[str]
) -> None:
    data = GlueDataModule(task)
    found = names_of(classifier(), data)
    assert list(found.test or ()) == [*test, "test/loss"]
    assert found.first == test[0]
    metrics = [f"val_{name}" for name in data.metric_names]
    assert found.fit == ("val_score", "val_loss", *metrics, *by_set, *STEP)
    split_off = names_of(classifier(), GlueDataModule(task, val_size=10))
    assert split_off.fit == ("val_score", "val_loss", *metrics, *STEP)


class OwnScore(TextDataModule):
    protocols = ArithmeticDataModule.protocols

    def __init__(self) -> None:
        super().__init__(None, "arithmetic-ours")
        self.test_tasks = ["own"]

    def score(self, task: str, rows: Any) -> dict[str, float]:
        return {"f1": 1.0}


class OwnNames(OwnScore):
    def score_names(self, task: str) -> tuple[str, ...]:
        return ("f1", "em")


class OwnModule(CausalLMModule):
    def validation_step(self, batch: Any, batch_idx: int) -> None: ...


def test_what_ones_own_classes_log_is_known_only_where_they_say_it() -> None:
    own = names_of(causal(), OwnScore())
    assert (own.test, own.first) == (None, "test/average")
    assert names_of(causal(), OwnNames()).test == ("test/own/f1", "test/own/em", "test/average")
    assert names_of(OwnModule("tiny_llama"), OwnNames()).fit is None
    labelled = names_of(classifier(), LabelledDataModule(None))
    assert (labelled.test, labelled.first) == (None, None)
    assert names_of(causal(), None).test is None


def test_a_callback_may_log_what_it_likes_unless_it_is_one_that_logs_nothing() -> None:
    data = ArithmeticDataModule()
    silent = ["lightning.pytorch.callbacks.ModelCheckpoint", "lightning.pytorch.callbacks.Timer"]
    assert names_of(causal(), data, silent) == names_of(causal(), data)
    for speaking in ("lightning.pytorch.callbacks.LearningRateMonitor", "mine.ModelCheckpoint"):
        found = names_of(causal(), data, [*silent, speaking])
        assert (found.test, found.fit, found.logged, found.all) == (None, None, None, None)
        assert found.first == "test/average"


TEXT = Names("Text", ("test/a", "test/average"), ("val_accuracy", "val_loss"), "test/average")
GLUE = Names("Glue", ("test/rte/accuracy",), ("val_score", "val_loss"), "test/rte/accuracy")
SILENT = Names("Chat", (), ("val_accuracy", "val_loss"), None)
OPEN = Names("Own", None, None, None)


def comparison(**changes: Any) -> Comparison:
    return Comparison({"a": {}, "b": {}}, "out", **changes)


@pytest.mark.parametrize(
    ("names", "score", "curve", "choose_by"),
    [
        (TEXT, "test/average", "val_accuracy", "val_accuracy"),
        (GLUE, "test/rte/accuracy", "val_score", "val_score"),
        (SILENT, "val_accuracy", "val_accuracy", "val_accuracy"),
    ],
)
def test_what_is_left_out_is_what_the_data_names_first(
    names: Names, score: str, curve: str, choose_by: str
) -> None:
    given = comparison(rates=Rates([0.1]))
    found, notes = resolve_names(given, {"a": names, "b": names})
    assert found.rates is not None
    assert (found.score, found.curve, found.rates.choose_by) == (score, curve, choose_by)
    assert notes == []
    assert given.rates is not None
    assert (given.score, given.curve, given.rates.choose_by) == (None, None, None)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"score": "test/average"},
            "score: no run will have 'test/average'; there are test/rte/accuracy, val_loss, "
            "val_score.",
        ),
        (
            {"also": ["val_los"]},
            "also[0]: no run will have 'val_los'; there are test/rte",
        ),
        ({"curve": "val_acc"}, "curve: no run will have 'val_acc'; there are epoch, grad_norm, lr"),
        (
            {"rates": Rates([0.1], choose_by="test/rte/accuracy")},
            "rates.choose_by: no run will have 'test/rte/accuracy'; there are val_loss, val_score.",
        ),
    ],
)
def test_a_name_that_no_run_will_have_is_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match="no run will have") as caught:
        resolve_names(comparison(**changes), {"a": GLUE, "b": GLUE})
    assert str(caught.value).startswith(sentence)


def test_runs_on_different_data_need_a_common_score() -> None:
    found = {"a": TEXT, "b": GLUE}
    with pytest.raises(ValueError, match="score: the runs have no common one") as caught:
        resolve_names(comparison(), found)
    assert str(caught.value).endswith(
        "since their data differ (a (Text) by test/average and b (Glue) by test/rte/accuracy); "
        "give score."
    )
    resolved, notes = resolve_names(comparison(score="test/average"), found)
    assert resolved.curve == "val_loss"
    assert notes == ["score: test/average is not a metric of b."]
    # A rate is chosen for every run.
    rates = Rates([0.1], choose_by="val_accuracy")
    with pytest.raises(ValueError, match=r"choose_by: b \(Glue\) will have no 'val_accuracy' to"):
        resolve_names(comparison(score="val_loss", rates=rates), found)


def test_what_only_a_run_can_tell_has_to_be_given_and_is_let_through() -> None:
    with pytest.raises(ValueError, match="score: what a will log on Own is not known before it"):
        resolve_names(comparison(), {"a": OPEN})
    given = comparison(score="anything", also=["else"], curve="loss", rates=Rates([0.1]))
    given.rates = Rates([0.1], choose_by="mine")
    found, _ = resolve_names(replace(given), {"a": OPEN})
    assert (found.score, found.curve) == ("anything", "loss")
