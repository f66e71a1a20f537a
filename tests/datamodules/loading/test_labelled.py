"""Rows of labelled texts, and the batches that they become."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset

from lightning_peft.datamodules.loading.labelled import Labelled, LabelledDataset

RECORDS = [Labelled("a", None, 1, 4), Labelled("abc", None, 0, 5), Labelled("ab", None, 2, 9)]
TABLE = Dataset.from_dict({"tokens": [[7], [7, 8, 9], [7, 8]], "cut": [0, 0, 0]})


def test_a_batch_is_padded_on_the_right() -> None:
    data = LabelledDataset(TABLE, RECORDS, pad_id=3, regression=False)
    batch = data.collate(data.__getitems__([2, 1]))
    assert batch["input_ids"].tolist() == [[7, 8, 3], [7, 8, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch["labels"].tolist() == [2, 0]
    assert batch["labels"].dtype == torch.long
    assert batch.keys() == {"input_ids", "attention_mask", "labels"}
    assert (len(data), data.count_targets([0, 2])) == (3, 2)


def test_token_types_sets_and_tasks_are_told_where_they_are_known() -> None:
    typed = TABLE.add_column("types", [[0], [0, 0, 1], [0, 1]])
    data = LabelledDataset(typed, RECORDS, 3, False, sets=[0, 1, 1], task="t")
    batch = data[2] | {}
    assert batch["token_type_ids"].tolist() == [[0, 1]]
    assert batch["set"].tolist() == [1]
    assert (batch["task"], batch["index"]) == ("t", [9])


def test_order_and_strata() -> None:
    data = LabelledDataset(TABLE, RECORDS, 3, False)
    assert data.lengths().tolist() == [1, 3, 2]
    assert data.longest_first() == [1, 2, 0]
    assert data.strata().tolist() == [1, 0, 2]


def test_scores_are_floats_whose_strata_are_rounded() -> None:
    records = [Labelled("a", "b", score, i) for i, score in enumerate((0.4, 2.6, 5.0))]
    data = LabelledDataset(TABLE, records, 3, regression=True)
    assert data.strata().tolist() == [0, 3, 5]
    labels = data.__getitems__([0, 1])["labels"]
    assert labels.dtype == torch.float32
    assert labels.tolist() == [pytest.approx(0.4), pytest.approx(2.6)]


def test_a_fingerprint_knows_texts_labels_and_positions() -> None:
    known = LabelledDataset(TABLE, RECORDS, 3, False).fingerprint()
    assert LabelledDataset(TABLE, RECORDS, 0, False).fingerprint() == known
    other = [*RECORDS[:2], Labelled("ab", None, 1, 9)]
    assert LabelledDataset(TABLE, other, 3, False).fingerprint() != known
    moved = [*RECORDS[:2], Labelled("ab", None, 2, 8)]
    assert LabelledDataset(TABLE, moved, 3, False).fingerprint() != known
