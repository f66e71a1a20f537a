"""What every task with labels does, by two small ones."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from lightning_peft.datamodules import Labelled, LabelledDataModule


class Spam(LabelledDataModule):
    """Single texts of two classes."""

    label_names = ("ham", "spam")

    def train_records(self) -> Sequence[Labelled]:
        return [Labelled(f"{'win ' * (i % 2)}{i}", None, i % 2, i) for i in range(8)]

    def held_out_records(self) -> Mapping[str, Sequence[Labelled]]:
        return {
            "new": [Labelled("win", None, 1, 0), Labelled("see you", None, 0, 1)],
            "old": [Labelled("win it", None, 1, 0)],
        }


class Nearness(LabelledDataModule):
    """Pairs with a score."""

    metric_names = ("pearson", "spearman")
    pair_names = ("One", "Other")

    def train_records(self) -> Sequence[Labelled]:
        return [Labelled("a", "b", 1.5, 0), Labelled("a", "a", 5.0, 1)]

    def held_out_records(self) -> Mapping[str, Sequence[Labelled]]:
        return {"near": self.train_records()}


def test_all_that_is_held_out_is_validated_together_and_tested_apart(build_data: Any) -> None:
    data = build_data(Spam, None, batch_size=4)
    assert data.val_sets == ["new", "old"]
    (batch,) = data.val_dataloader()
    rows = zip(batch["set"].tolist(), batch["labels"].tolist(), strict=True)
    assert sorted(rows) == [(0, 0), (0, 1), (1, 1)]
    assert data.test_tasks == ["new", "old"]
    assert data.counts["test"] == {"new": 2, "old": 1}
    assert (data.counts["train"], data.counts["val"]) == (8, 3)


def test_with_a_val_size_what_is_tested_chooses_nothing(build_data: Any) -> None:
    data = build_data(Spam, None, val_size=3, batch_size=8)
    assert (data.val_sets, data.test_tasks) == (["train"], ["new", "old"])
    assert (data.counts["train"], data.counts["val"]) == (5, 3)
    (trained,), (validated,) = data.train_dataloader(), data.val_dataloader()
    rows = {tuple(row) for batch in (trained, validated) for row in batch["input_ids"].tolist()}
    assert len(rows) == 8  # each training record is in one of them
    assert validated["set"].tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="data.val_size is 8, which leaves nothing of the 8"):
        build_data(Spam, None, val_size=8)


def test_limits_keep_fixed_samples(build_data: Any) -> None:
    seen = []
    for _ in range(2):
        data = build_data(Spam, None, train_limit=3, test_limit=1, val_limit=2)
        assert (data.counts["train"], data.counts["val"]) == (3, 2)
        assert data.counts["test"] == {"new": 1, "old": 1}
        seen.append([b["input_ids"].tolist() for b in data.train_dataloader()])
    assert seen[0] == seen[1]


def test_each_row_counts_once_in_a_window(build_data: Any) -> None:
    data = build_data(Spam, None, batch_size=3)
    batches = list(data.train_dataloader())
    assert [int(b["num_target_tokens"]) for b in batches] == [len(b["labels"]) for b in batches]


@pytest.mark.parametrize(
    ("kind", "template"), [(Spam, "{first}"), (Nearness, "One: {first}\nOther: {second}")]
)
def test_the_protocol_says_how_texts_are_joined(kind: type, template: str, build_data: Any) -> None:
    data = build_data(kind, None, max_length=60)
    assert (data.protocol.name, data.protocol.template) == ("pairs-ours", template)
    assert data.protocol.max_length == 60
    stamp = data.test_stamp(data.test_tasks[0])
    assert (stamp["name"], stamp["records"]) == ("pairs-ours", 2)


def test_predictions_of_classes_are_right_or_wrong_and_scores_are_neither() -> None:
    rows: list[dict[str, Any]] = [
        {"output": "spam", "expected": "spam"},
        {"output": "ham", "expected": "spam"},
    ]
    spam = Spam(None)
    spam.judge("new", rows)
    assert [row["correct"] for row in rows] == [True, False]
    assert spam.score("new", rows) == {"accuracy": 0.5}
    losses = [{**row, "loss": loss} for row, loss in zip(rows, (0.5, 2.0), strict=True)]
    assert spam.score("new", losses) == {"accuracy": 0.5, "loss": 1.25}
    assert spam.score("new", [losses[0], rows[1]]) == {"accuracy": 0.5}  # not that of one record
    assert (spam.label_text(1), Nearness(None).label_text(2.5)) == ("spam", 2.5)
    graded: list[dict[str, Any]] = [{"output": x, "expected": 2 * x + 1} for x in (1.0, 2.0, 4.0)]
    near = Nearness(None)
    near.judge("near", graded)
    assert "correct" not in graded[0]
    assert near.score("near", graded) == {
        "pearson": pytest.approx(1.0),
        "spearman": pytest.approx(1.0, abs=1e-5),
    }


def test_what_is_there_from_setup_on_says_so_before() -> None:
    with pytest.raises(RuntimeError, match="known from `setup` on"):
        _ = Spam(None).encoder
    with pytest.raises(ValueError, match=r"^data.max_length is 7; it has to be 8 or more\.$"):
        Spam(None, max_length=7)


class Given(LabelledDataModule):
    """Records of somebody's file."""

    label_names: Any = ("ham", "spam")
    given: Any = ()

    def train_records(self) -> Sequence[Labelled]:
        return self.given  # type: ignore[no-any-return]

    def held_out_records(self) -> Mapping[str, Sequence[Labelled]]:
        return {"new": [Labelled("a", None, 0, 0)]}


def test_labels_in_digits_as_csv_has_them_are_numbers(build_data: Any) -> None:
    class Digits(Given):
        given = (Labelled("a", None, "1", 0), Labelled("b", None, 0.0, 1))  # type: ignore[arg-type]

    (batch,) = build_data(Digits, None, batch_size=2, group_by_length=False).train_dataloader()
    assert sorted(batch["labels"].tolist()) == [0, 1]

    class Scores(Given):
        label_names = None
        metric_names = ("pearson",)
        given = (Labelled("a", None, "1.50", 0), Labelled("b", None, 2, 1))  # type: ignore[arg-type]

    (batch,) = build_data(Scores, None, batch_size=2, group_by_length=False).train_dataloader()
    assert sorted(batch["labels"].tolist()) == [1.5, 2.0]


@pytest.mark.parametrize(
    ("names", "record", "sentence"),
    [
        (("a", "b"), ("x", None, 2), "has the label 2; wanted is a class from 0 to 1."),
        (("a", "b"), ("x", None, -1), "has the label -1; wanted is a class from 0 to 1."),
        (("a", "b"), ("x", None, 0.5), "has the label 0.5; wanted is a class from 0 to 1."),
        (("a", "b"), ("x", None, True), "has the label True; wanted is a class from 0 to 1."),
        (("a", "b"), ("x", None, "spam"), "has the label 'spam'; wanted is a class from 0 to 1."),
        (("a", "b"), ("x", None, None), "has the label None; wanted is a class from 0 to 1."),
        (None, ("x", None, float("nan")), "has the label nan; wanted is a number."),
        (None, ("x", None, "1_0"), "has the label '1_0'; wanted is a number."),
        (None, ("x", None, [1]), "has the label [1]; wanted is a number."),
        (("a", "b"), (5, None, 1), "has no text in 'first' but the number 5; write it as a text, "),
        (("a", "b"), (None, None, 1), "has no text in 'first'; give one."),
        (("a", "b"), ("x", 0, 1), "has no text in 'second' but the number 0; write it as a text,"),
    ],
)
def test_a_record_of_another_kind_is_named(
    names: Any, record: Any, sentence: str, build_data: Any
) -> None:
    class Wrong(Given):
        label_names = names
        given = (Labelled("a", None, 0, 0), Labelled(*record, 1))

    with pytest.raises(ValueError, match=f"^Record 2 of train {re.escape(sentence)}"):
        build_data(Wrong, None)
