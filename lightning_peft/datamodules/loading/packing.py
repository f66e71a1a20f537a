"""Several records in one row, so that training spends nothing on padding.

Records are put together into packs of at most ``max_length`` tokens, and each pack of a batch is a
row: its records one after the other, each with positions from 0. The model gets ``position_ids``
and no attention mask (:mod:`lightning_peft.models.packing`). From the restarts transformers tells
where a record begins, and lets none attend to another. So each record gets the very loss and
gradient that it has in a padded batch.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset

from lightning_peft.datamodules.loading.batches import IGNORED, Row, TrainingData, pad, row_labels
from lightning_peft.datamodules.loading.samplers import SPLIT_SEED
from lightning_peft.errors import UserError

Pack = Sequence[Row]


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
            raise UserError(
                "data.packing is true, but all of these records are of one length, so that batches "
                "hold no padding; set it to false."
            )
        self.packs = packs_of(lengths, limit)
        self._lengths = np.array([lengths[rows].sum() for rows in self.packs], dtype=np.int64)

    def __len__(self) -> int:
        """Return the number of packs."""
        return len(self.packs)

    def __getitems__(self, indices: Sequence[int]) -> list[Pack]:
        """Return the records of each pack."""
        return [self.data.__getitems__(self.packs[i].tolist()) for i in indices]

    def collate(self, packs: Sequence[Pack]) -> dict[str, Tensor]:
        """Make a packed batch."""
        return packed_batch(packs)

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


def packed_batch(packs: Sequence[Pack], pad_id: int = 0) -> dict[str, Tensor]:
    """Put the records of each pack into one row.

    Args:
        packs: Of each record its token ids, and the positions between which labels begin and end (a
            flat list).
        pad_id: Written where a row ends.

    Returns:
        ``input_ids``, ``attention_mask`` (which counts tokens), ``labels`` and ``position_ids``,
        each `(packs, tokens)`. A record's first token is never a label: what stands before it is
        another record. Each token of the padding is a record of its own, at position 0.
    """

    def joined(pieces: list[list[Sequence[int]]], end: int) -> Tensor:
        return pad([[value for piece in row for value in piece] for row in pieces], end)

    return {
        "input_ids": joined([[ids for ids, _ in pack] for pack in packs], pad_id),
        "attention_mask": joined([[[1] * len(ids) for ids, _ in pack] for pack in packs], 0),
        "labels": joined(
            [[[IGNORED, *row_labels(*row)[1:]] for row in pack] for pack in packs], IGNORED
        ),
        "position_ids": joined([[range(len(ids)) for ids, _ in pack] for pack in packs], 0),
    }
