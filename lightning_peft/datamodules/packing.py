"""Several records in one row, so that training spends nothing on padding.

Records are put together into packs of at most ``max_length`` tokens, and a batch of packs is one
row: all their records one after the other, each with positions from 0. It goes to the model with
``position_ids`` and without an attention mask. From the restarts transformers tells where a record
begins, and lets none attend to another: by a block-diagonal mask (`sdpa`, `eager`, `flex`), or by
FlashAttention's kernels for rows of variable length, which take one row only. So each record gets
the very loss and gradient that it has in a padded batch.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset

from lightning_peft.datamodules.batches import IGNORED, TrainingData, row_labels
from lightning_peft.datamodules.samplers import SPLIT_SEED


def packs_of(lengths: np.ndarray, limit: int) -> list[np.ndarray]:
    """Put rows together, by best-fit decreasing: each into the fullest pack that has room for it.

    Args:
        lengths: Every row's length in tokens, none over the limit.
        limit: Most tokens in a pack.

    Returns:
        Each pack's rows, the same every time; rows of one length come in random order.
    """
    order = np.random.default_rng(SPLIT_SEED).permutation(len(lengths))
    packs: list[list[int]] = []
    by_room: dict[int, list[int]] = {}
    rooms: list[int] = []  # the keys of `by_room`, ascending: at most `limit` of them
    for row in order[np.argsort(-lengths[order], kind="stable")].tolist():
        length = int(lengths[row])
        place = bisect.bisect_left(rooms, length)
        if place == len(rooms):
            pack, room = len(packs), limit
            packs.append([])
        else:
            room = rooms[place]
            pack = by_room[room].pop()
            if not by_room[room]:
                del by_room[room], rooms[place]
        packs[pack].append(row)
        left = room - length
        if left not in by_room:
            by_room[left] = []
            bisect.insort(rooms, left)
        by_room[left].append(pack)
    return [np.array(pack, dtype=np.int64) for pack in packs]


class PackedDataset(TorchDataset[Any]):
    """A data set of packs of another's rows.

    Args:
        data: The rows, as (tokens, where labels begin and end).
        limit: Most tokens in a pack.

    Attributes:
        packs: Each pack's rows of ``data``.
    """

    def __init__(self, data: TrainingData, limit: int) -> None:
        self.data = data
        lengths = self.data.lengths()
        if lengths is None:
            raise ValueError(
                "data.packing is true, but all of these records are of one length, so that batches "
                "hold no padding; set it to false."
            )
        self.packs = packs_of(lengths, limit)
        self._lengths = np.array([lengths[rows].sum() for rows in self.packs], dtype=np.int64)

    def __len__(self) -> int:
        """Return the number of packs."""
        return len(self.packs)

    def __getitems__(self, indices: Sequence[int]) -> Any:
        """Return the records of packs, one after the other."""
        return self.data.__getitems__(self._rows(indices).tolist())

    def collate(self, rows: Sequence[tuple[list[int], list[int]]]) -> dict[str, Tensor]:
        """Make a packed batch."""
        return packed_batch(rows)

    def count_targets(self, indices: Sequence[int]) -> int:
        """Count the labels of packs that a causal model predicts."""
        return self.data.count_targets(self._rows(indices).tolist())

    def lengths(self) -> np.ndarray:
        """Return every pack's length in tokens."""
        return self._lengths

    def strata(self) -> np.ndarray:
        """Return the task of every pack's first record as a number."""
        return self.data.strata()[[rows[0] for rows in self.packs]]

    def _rows(self, indices: Sequence[int]) -> np.ndarray:
        return np.concatenate([self.packs[i] for i in indices])


def packed_batch(rows: Sequence[tuple[list[int], list[int]]]) -> dict[str, Tensor]:
    """Put records into one row.

    Args:
        rows: Token ids, and the positions between which labels begin and end (a flat list).

    Returns:
        ``input_ids``, ``attention_mask`` (ones, which count tokens), ``labels`` and
        ``position_ids``, each `(1, tokens)`. A record's first token is never a label: what stands
        before it is another record.
    """
    columns: dict[str, list[Sequence[int]]] = {
        "input_ids": [ids for ids, _ in rows],
        "attention_mask": [[1] * len(ids) for ids, _ in rows],
        "labels": [[IGNORED, *row_labels(*row)[1:]] for row in rows],
        "position_ids": [range(len(ids)) for ids, _ in rows],
    }
    return {
        name: torch.tensor([[value for piece in pieces for value in piece]])
        for name, pieces in columns.items()
    }
