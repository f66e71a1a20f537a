"""What each of GLUE's eight tasks is: its labels, its columns, its metrics and its dev sets."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class GlueTask:
    """Where one task's records are, and what they mean.

    Attributes:
        folder: The task's folder in GLUE's archive.
        labels: Names of the classes in the order of their indices; None for scores.
        tsv: The tsv file's columns of the text or texts, and of the label.
        fields: The fields of the text or texts on the hub.
        metrics: Of its predictions, the task's own first.
        names: What the two texts are called.
        header: All columns, of files that lack a header.
        dev: Validation sets by task name; each has the file names it may have, the hub's second.
    """

    folder: str
    labels: tuple[str, ...] | None
    tsv: tuple[str, ...]
    fields: tuple[str, ...]
    metrics: tuple[str, ...] = ("accuracy",)
    names: tuple[str, str] = ("Sentence 1", "Sentence 2")
    header: tuple[str, ...] = ()
    dev: tuple[tuple[str, tuple[str, ...]], ...] = ()


QQP = ("id", "qid1", "qid2", "question1", "question2", "is_duplicate")
ENTAILMENT = ("entailment", "not_entailment")
TASKS = {
    "cola": GlueTask(
        "CoLA",
        ("unacceptable", "acceptable"),
        ("sentence", "label"),
        ("sentence",),
        ("matthews", "accuracy"),
        header=("source", "label", "mark", "sentence"),
    ),
    "sst2": GlueTask("SST-2", ("negative", "positive"), ("sentence", "label"), ("sentence",)),
    "mrpc": GlueTask(
        "MRPC",
        ("not_equivalent", "equivalent"),
        ("#1 String", "#2 String", "Quality"),
        ("sentence1", "sentence2"),
        ("accuracy", "f1"),
    ),
    "qqp": GlueTask(
        "QQP",
        ("not_duplicate", "duplicate"),
        ("question1", "question2", "is_duplicate"),
        ("question1", "question2"),
        ("accuracy", "f1"),
        ("Question 1", "Question 2"),
        header=QQP,
        dev=(("qqp", ("dev", "validation", "sample")),),
    ),
    "stsb": GlueTask(
        "STS-B",
        None,
        ("sentence1", "sentence2", "score"),
        ("sentence1", "sentence2"),
        ("spearman", "pearson"),
    ),
    "mnli": GlueTask(
        "MNLI",
        ("entailment", "neutral", "contradiction"),
        ("sentence1", "sentence2", "gold_label"),
        ("premise", "hypothesis"),
        names=("Premise", "Hypothesis"),
        dev=(
            ("mnli_matched", ("dev_matched", "validation_matched")),
            ("mnli_mismatched", ("dev_mismatched", "validation_mismatched")),
        ),
    ),
    "qnli": GlueTask(
        "QNLI",
        ENTAILMENT,
        ("question", "sentence", "label"),
        ("question", "sentence"),
        names=("Question", "Sentence"),
    ),
    "rte": GlueTask(
        "RTE",
        ENTAILMENT,
        ("sentence1", "sentence2", "label"),
        ("sentence1", "sentence2"),
        names=("Premise", "Hypothesis"),
    ),
}


def spelled(name: str) -> str:
    """A task's name without capitals, blanks and marks, in which its usual spellings agree."""
    return re.sub(r"[^a-z0-9]", "", name.lower())
