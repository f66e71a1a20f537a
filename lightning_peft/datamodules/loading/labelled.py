"""Labelled texts, one or two to a record, and how their rows become batches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import Dataset as TorchDataset

from lightning_peft.datamodules.loading.batches import fingerprint, pad
from lightning_peft.datamodules.loading.fields import no_text, number_of
from lightning_peft.errors import UserError, shown

if TYPE_CHECKING:
    import datasets


@dataclass(frozen=True)
class Labelled:
    """One text or two, and what they are to be recognised as.

    Attributes:
        first: A text.
        second: The other one of a pair; None in tasks of single texts.
        label: A class index, or a score.
        index: The record's position in its split, from 0, by which predictions name it.
    """

    first: str
    second: str | None
    label: int | float
    index: int


def checked_label(record: Labelled, names: Sequence[str] | None, place: str) -> Labelled:
    """Return a record whose label is a number, as csv writes it in digits too.

    Args:
        record: The record.
        names: Of the classes; None where labels are scores.
        place: Names the set in errors.

    Raises:
        UserError: If its label is no class index, or no score, or it holds no text.
    """
    name = f"Record {record.index + 1} of {place}"
    for field in ("first", "second"):
        value = getattr(record, field)
        if not isinstance(value, str) and (value is not None or field == "first"):
            raise UserError(f"{name} {no_text(field, value)}.")
    found = number_of(record.label)
    if names is None and found is not None and math.isfinite(found):
        return replace(record, label=found)
    if names is not None and found in range(len(names)):
        return replace(record, label=int(found))  # type: ignore[arg-type]
    wanted = f"a class from 0 to {len(names) - 1}" if names is not None else "a number"
    raise UserError(f"{name} has the label {shown(record.label)}; wanted is {wanted}.")


class LabelledDataset(TorchDataset[Any]):
    """Encoded records with their labels.

    Args:
        table: What `PairEncoder.cached` gives.
        records: The same records.
        pad_id: What rows are padded with.
        regression: Whether labels are scores.
        sets: Of data that are not trained on: which of their sets each row is of, by its number.
        task: Of a test set: its task's name.
    """

    def __init__(
        self,
        table: datasets.Dataset,
        records: Sequence[Labelled],
        pad_id: int,
        regression: bool,
        sets: Sequence[int] | None = None,
        task: str | None = None,
    ) -> None:
        self.table, self.pad_id, self.task = table, pad_id, task
        self._index = [record.index for record in records]
        kind: Any = np.float32 if regression else np.int64
        self._labels = np.array([record.label for record in records], dtype=kind)
        self._sets = None if sets is None else np.array(sets, dtype=np.int64)
        self._lengths = np.array([len(ids) for ids in table["tokens"]], dtype=np.int64)

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._labels)

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Any]:
        """Return the batch of rows."""
        rows = np.asarray(indices, dtype=np.int64)
        columns = self.table[rows.tolist()]
        batch: dict[str, Any] = {
            "input_ids": pad(columns["tokens"], self.pad_id),
            "attention_mask": pad([[1] * len(ids) for ids in columns["tokens"]], 0),
            "labels": torch.from_numpy(self._labels[rows]),
        }
        if "types" in columns:
            batch["token_type_ids"] = pad(columns["types"], 0)
        if self._sets is not None:
            batch["set"] = torch.from_numpy(self._sets[rows])
        if self.task is not None:
            batch |= {"task": self.task, "index": [self._index[i] for i in rows]}
        return batch

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return a batch of one row."""
        return self.__getitems__([index])

    def collate(self, rows: dict[str, Any]) -> dict[str, Any]:
        """Return the batch as it is."""
        return rows

    def count_targets(self, indices: Sequence[int]) -> int:
        """Count labels: one for each row."""
        return len(indices)

    def lengths(self) -> np.ndarray:
        """Return every row's length in tokens."""
        return self._lengths

    def longest_first(self) -> list[int]:
        """Order rows by length, so that batches hold little padding and memory runs out at once."""
        return np.argsort(-self._lengths, kind="stable").tolist()

    def fingerprint(self) -> str:
        """Identify what is asked and what is expected, record by record."""
        rows = zip(self._index, self._labels.tolist(), self.table["tokens"], strict=True)
        return fingerprint(list(row) for row in rows)

    def strata(self) -> np.ndarray:
        """Return every row's label, scores rounded, for samples stratified by it."""
        return np.rint(self._labels).astype(np.int64)
