from __future__ import annotations

import pytest

from lightning_peft.datamodules.glue.module import GlueDataModule
from lightning_peft.datamodules.glue.tasks import TASKS, spelled


@pytest.mark.parametrize(
    ("spelling", "task"),
    [("SST-2", "sst2"), ("sst_2", "sst2"), ("STS-B", "stsb"), ("CoLA", "cola"), ("MNLI", "mnli")],
)
def test_usual_spellings_are_known(spelling: str, task: str) -> None:
    assert GlueDataModule(spelling, "anywhere").task == task


def test_marks_and_capitals_do_not_matter() -> None:
    assert {spelled(name) for name in ("STS-B", "sts_b", "Sts B")} == {"stsb"}


def test_each_task_names_as_many_columns_as_texts_and_a_label() -> None:
    assert list(TASKS) == ["cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte"]
    for task in TASKS.values():
        assert len(task.tsv) == len(task.fields) + 1
        assert set(task.tsv) <= set(task.header) or not task.header
    assert [name for name, task in TASKS.items() if task.labels is None] == ["stsb"]
    assert TASKS["mnli"].labels == ("entailment", "neutral", "contradiction")
    firsts = {name: task.metrics[0] for name, task in TASKS.items()}
    odd = {name: metric for name, metric in firsts.items() if metric != "accuracy"}
    assert odd == {"cola": "matthews", "stsb": "spearman"}
