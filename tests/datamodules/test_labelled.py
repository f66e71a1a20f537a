"""What every task with labels does, by two small ones."""

from __future__ import annotations

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
