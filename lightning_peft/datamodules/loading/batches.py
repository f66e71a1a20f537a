"""Encoded data sets and how their rows become batches.

A data set here answers a whole batch at once (``__getitems__``, which `DataLoader` prefers), makes
the batch itself (``collate``), and says how many target tokens rows hold (``count_targets``)
without fetching them. From that the loader weighs an accumulation window in advance; `loader` says
how the count reaches the loss.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset

from lightning_peft.datamodules.loading.examples import Example

if TYPE_CHECKING:
    import datasets

IGNORED = -100


class TrainingData(Protocol):
    """What a data set has to offer for training and validation."""

    def __len__(self) -> int:
        """Return the number of rows."""
        ...

    def __getitems__(self, indices: Sequence[int]) -> Any:
        """Return the rows of a batch, in whatever form ``collate`` takes."""
        ...

    def collate(self, rows: Any) -> dict[str, Any]:
        """Make the batch of rows."""
        ...

    def count_targets(self, indices: Sequence[int]) -> int:
        """Count what the loss is a mean over: a causal model's predicted labels, or one a row."""
        ...

    def lengths(self) -> np.ndarray | None:
        """Return every row's length in tokens; None where all are alike."""
        ...

    def strata(self) -> np.ndarray:
        """Return every row's task as a number, for samples stratified by task."""
        ...


def pad(rows: Sequence[Sequence[int]], value: int, left: bool = False) -> Tensor:
    """Pad rows to the longest, giving `(n, longest)`."""
    width = max(map(len, rows))
    out = torch.full((len(rows), width), value, dtype=torch.long)
    for i, row in enumerate(rows):
        ids = torch.as_tensor(row, dtype=torch.long)
        out[i, slice(width - len(row), None) if left else slice(len(row))] = ids
    return out


def target_positions(labels: Tensor) -> Tensor:
    """Where a causal model has a target: rows, and the positions before each target.

    A loader finds them, since on a GPU finding them waits for it.

    Args:
        labels: (batch, tokens); ``IGNORED`` is none.

    Returns:
        (2, targets), int64.
    """
    return (labels[:, 1:] != IGNORED).nonzero().T


Row = tuple[list[int], list[int]]


def training_batch(rows: Sequence[Row], pad_id: int) -> dict[str, Tensor]:
    """Pad on the right.

    Args:
        rows: Token ids, and the positions between which labels begin and end (a flat list).
        pad_id: Written where a row ends; never a label, even where it is EOS's id.

    Returns:
        ``input_ids``, ``attention_mask`` and ``labels``, each `(n, longest)`.
    """
    return {
        "input_ids": pad([ids for ids, _ in rows], pad_id),
        "attention_mask": pad([[1] * len(ids) for ids, _ in rows], 0),
        "labels": pad([row_labels(*row) for row in rows], IGNORED),
    }


def row_labels(ids: list[int], spans: Sequence[int]) -> list[int]:
    """Return a row's labels: its ids within the spans, else ``IGNORED``."""
    labels = [IGNORED] * len(ids)
    for begin, end in zip(spans[::2], spans[1::2], strict=True):
        labels[begin:end] = ids[begin:end]
    return labels


def _predicted(spans: Sequence[int]) -> int:
    """Count the tokens in spans; the first of a row is predicted by nothing."""
    pairs = zip(spans[::2], spans[1::2], strict=True)
    return sum(max(end, 1) - max(begin, 1) for begin, end in pairs)


class EncodedDataset(TorchDataset[Any]):
    """Prompts with responses, for training and validation.

    Args:
        table: The columns of :meth:`Encoder.encode`.
        tasks: Every row's task.
        pad_id: Written where a row ends.
        loss_on: ``response`` or ``all``.
    """

    def __init__(
        self, table: datasets.Dataset, tasks: Sequence[str], pad_id: int, loss_on: str
    ) -> None:
        self.table = table
        self.pad_id = pad_id
        self._lengths = np.array([len(tokens) for tokens in table["tokens"]], dtype=np.int64)
        last = zip(table["prompt_length"], self._lengths.tolist(), strict=True)
        self._spans: list[list[int]] = [
            [0, length] if loss_on == "all" else [*earlier, first, length]
            for earlier, (first, length) in zip(table["earlier"], last, strict=True)
        ]
        self._targets = np.array([_predicted(spans) for spans in self._spans], dtype=np.int64)
        self._strata = np.unique(np.array(tasks), return_inverse=True)[1]

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._lengths)

    def __getitems__(self, indices: Sequence[int]) -> list[Row]:
        """Return rows as (tokens, where labels begin and end)."""
        tokens = self.table[list(map(int, indices))]["tokens"]
        return [(ids, self._spans[i]) for ids, i in zip(tokens, indices, strict=True)]

    def __getitem__(self, index: int) -> Row:
        """Return one row as (tokens, where labels begin and end)."""
        return self.__getitems__([index])[0]

    def collate(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Make a training batch."""
        return training_batch(rows, self.pad_id)

    def count_targets(self, indices: Sequence[int]) -> int:
        """Count the labels of rows that a causal model predicts."""
        return int(self._targets[np.asarray(indices, dtype=np.int64)].sum())

    def lengths(self) -> np.ndarray:
        """Return every row's length in tokens."""
        return self._lengths

    def strata(self) -> np.ndarray:
        """Return every row's task as a number."""
        return self._strata


class PromptDataset(TorchDataset[Any]):
    """Prompts alone, for testing by generation.

    Args:
        tokens: Every prompt's ids.
        examples: Its record.
        pad_id: Written before a prompt, so that every answer begins in the same column.
    """

    def __init__(
        self, tokens: Sequence[Sequence[int]], examples: Sequence[Example], pad_id: int
    ) -> None:
        self.tokens, self.examples, self.pad_id = tokens, examples, pad_id

    def __len__(self) -> int:
        """Return the number of prompts."""
        return len(self.tokens)

    def __getitem__(self, index: int) -> tuple[Sequence[int], Example]:
        """Return one prompt's ids and its record."""
        return self.tokens[index], self.examples[index]

    def longest_first(self) -> list[int]:
        """Order rows by length, so that batches hold little padding and memory runs out at once."""
        return sorted(range(len(self)), key=lambda i: -len(self.tokens[i]))

    def fingerprint(self) -> str:
        """Identify what is asked and what is expected, record by record."""
        rows = zip(self.tokens, self.examples, strict=True)
        return fingerprint([e.index, e.prompt, e.expected, list(ids)] for ids, e in rows)

    def collate(self, rows: Sequence[tuple[Sequence[int], Example]]) -> dict[str, Any]:
        """Pad on the left: ``input_ids`` and ``attention_mask`` `(n, longest)`, and the records."""
        tokens, examples = zip(*rows, strict=True)
        return {
            "input_ids": pad(tokens, self.pad_id, left=True),
            "attention_mask": pad([[1] * len(ids) for ids in tokens], 0, left=True),
            "index": [e.index for e in examples],
            "prompt": [e.prompt for e in examples],
            "expected": [e.expected for e in examples],
            "task": examples[0].task,
        }


def fingerprint(records: Iterable[Any]) -> str:
    """Identify records, in any form that JSON holds, by 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for record in records:
        digest.update(json.dumps(record).encode() + b"\n")
    return digest.hexdigest()[:16]


class Subset:
    """Some rows of a data set, as a data set.

    Args:
        data: The whole.
        rows: Indices of the rows to keep, in order.
    """

    def __init__(self, data: TrainingData, rows: Sequence[int] | np.ndarray) -> None:
        self.data, self.rows = data, np.asarray(rows, dtype=np.int64)
        self.collate = data.collate

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.rows)

    def __getitems__(self, indices: Sequence[int]) -> Any:
        """Return the rows of a batch."""
        return self.data.__getitems__(self.rows[list(indices)])  # type: ignore[arg-type]

    def count_targets(self, indices: Sequence[int]) -> int:
        """Count the labels of rows that a causal model predicts."""
        return self.data.count_targets(self.rows[list(indices)])  # type: ignore[arg-type]

    def lengths(self) -> np.ndarray | None:
        """Return every row's length in tokens; None where all are alike."""
        lengths = self.data.lengths()
        return None if lengths is None else lengths[self.rows]

    def strata(self) -> np.ndarray:
        """Return every row's task as a number."""
        return self.data.strata()[self.rows]
