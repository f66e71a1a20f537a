"""Any rows become the batch that a loop over cells would make of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_peft.datamodules.loading.batches import (
    EncodedDataset,
    PromptDataset,
    Subset,
    pad,
    training_batch,
)
from lightning_peft.datamodules.loading.examples import Example
from lightning_peft.datamodules.loading.packing import PackedDataset, packed_batch, packs_of

FAST = settings(derandomize=True, deadline=None, max_examples=60)
IDS = st.integers(0, 9)  # padding's id among them, as where EOS pads
Row = tuple[list[int], list[int]]


@st.composite
def rows(draw: Any) -> Row:
    """Token ids, and where labels begin and end: spans that do not overlap, empty ones too."""
    ids = draw(st.lists(IDS, min_size=1, max_size=9))
    marks = draw(st.lists(st.integers(0, len(ids)), max_size=6))
    return ids, sorted(marks[: len(marks) // 2 * 2])


BATCHES = st.lists(rows(), min_size=1, max_size=6)
PAD = st.integers(0, 3)


def learnt(row: Row) -> list[int]:
    ids, spans = row
    inside = {i for b, e in zip(spans[::2], spans[1::2], strict=True) for i in range(b, e)}
    return [token if i in inside else -100 for i, token in enumerate(ids)]


@FAST
@given(st.lists(st.lists(IDS, min_size=1, max_size=9), min_size=1, max_size=6), PAD, st.booleans())
def test_padding_stands_on_one_side_and_nowhere_else(
    lists: list[list[int]], value: int, left: bool
) -> None:
    width = max(map(len, lists))
    fill = [[value] * (width - len(row)) for row in lists]
    wanted = [[*f, *row] if left else [*row, *f] for row, f in zip(lists, fill, strict=True)]
    assert pad(lists, value, left).tolist() == wanted


@FAST
@given(BATCHES, PAD)
def test_labels_are_the_ids_of_spans_and_nothing_else(batch: list[Row], pad_id: int) -> None:
    made = training_batch(batch, pad_id)
    width = max(len(ids) for ids, _ in batch)
    for i, (ids, _) in enumerate(batch):
        rest = width - len(ids)
        assert made["input_ids"][i].tolist() == [*ids, *[pad_id] * rest]
        assert made["attention_mask"][i].tolist() == [1] * len(ids) + [0] * rest
        assert made["labels"][i].tolist() == [*learnt(batch[i]), *[-100] * rest]


def encoded(batch: list[Row], pad_id: int, loss_on: str = "response") -> EncodedDataset:
    """The last span is the response, up to the end; those before are earlier ones."""
    columns: dict[str, list[Any]] = {"tokens": [], "prompt_length": [], "earlier": []}
    for ids, spans in batch:
        columns["tokens"].append(ids)
        columns["prompt_length"].append(spans[-1] if spans else 0)
        columns["earlier"].append(spans[:-2])
    return EncodedDataset(Dataset.from_dict(columns), ["t"] * len(batch), pad_id, loss_on)


@FAST
@given(BATCHES, PAD, st.sampled_from(["response", "all"]), st.data())
def test_targets_are_counted_as_a_causal_model_predicts_them(
    batch: list[Row], pad_id: int, loss_on: str, data: Any
) -> None:
    whole = encoded(batch, pad_id, loss_on)
    chosen = data.draw(st.lists(st.integers(0, len(batch) - 1), min_size=1, max_size=6))
    part = Subset(whole, chosen)
    indices = list(range(len(part)))
    made = part.collate(part.__getitems__(indices))
    assert part.count_targets(indices) == int((made["labels"][:, 1:] != -100).sum())
    kept = [ids[mask.bool()].tolist() for ids, mask in zip(*list(made.values())[:2], strict=True)]
    assert kept == [batch[i][0] for i in chosen]


@FAST
@given(st.lists(st.lists(IDS, min_size=1, max_size=9), min_size=1, max_size=6), PAD)
def test_prompts_end_in_one_column(lists: list[list[int]], pad_id: int) -> None:
    examples = [Example(f"p{i}", "", "t", i, [i]) for i in range(len(lists))]
    data = PromptDataset(lists, examples, pad_id)
    order = data.longest_first()
    assert sorted(order) == list(range(len(lists)))
    made = data.collate([data[i] for i in order])
    for place, i in enumerate(order):
        rest = len(lists[order[0]]) - len(lists[i])
        assert made["input_ids"][place].tolist() == [*[pad_id] * rest, *lists[i]]
        assert made["attention_mask"][place].tolist() == [0] * rest + [1] * len(lists[i])
    assert (made["index"], made["expected"]) == (order, [[i] for i in order])


# Packing ------------------------------------------------------------------------------------------


@FAST
@given(st.lists(st.integers(1, 20), min_size=1, max_size=60), st.integers(20, 50))
def test_every_row_is_packed_once_and_no_pack_is_over_the_limit(
    sizes: list[int], limit: int
) -> None:
    lengths = np.array(sizes)
    packs = packs_of(lengths, limit)
    assert sorted(np.concatenate(packs).tolist()) == list(range(len(sizes)))
    full = [int(lengths[pack].sum()) for pack in packs]
    assert max(full) <= limit
    # Of two packs that one would hold, best fit opens no second.
    assert all(a + b > limit for i, a in enumerate(full) for b in full[i + 1 :])


@FAST
@given(st.lists(BATCHES, min_size=1, max_size=3), PAD)
def test_a_pack_holds_its_records_in_order_each_from_position_0(
    packs: list[list[Row]], pad_id: int
) -> None:
    made = {name: value.tolist() for name, value in packed_batch(packs, pad_id).items()}
    width = max(sum(len(ids) for ids, _ in pack) for pack in packs)
    for i, pack in enumerate(packs):
        ids = [token for row, _ in pack for token in row]
        rest = [0] * (width - len(ids))
        assert made["input_ids"][i] == ids + [pad_id] * len(rest)
        assert made["attention_mask"][i] == [1] * len(ids) + rest
        assert made["position_ids"][i] == [p for row, _ in pack for p in range(len(row))] + rest
        labels = [label for row in pack for label in [-100, *learnt(row)[1:]]]
        assert made["labels"][i] == labels + [-100] * len(rest)


@FAST
@given(BATCHES, st.integers(9, 30))
def test_packed_data_have_the_tokens_and_targets_of_the_plain_ones(
    batch: list[Row], limit: int
) -> None:
    plain = encoded(batch, 0)
    packed = PackedDataset(plain, limit)
    every = list(range(len(packed)))
    made = packed.collate(packed.__getitems__(every))
    assert sorted(made["input_ids"][made["attention_mask"].bool()].tolist()) == sorted(
        token for ids, _ in batch for token in ids
    )
    targets = int((made["labels"][:, 1:] != -100).sum())
    assert packed.count_targets(every) == plain.count_targets(range(len(batch))) == targets
    assert made["attention_mask"].sum(1).tolist() == packed.lengths().tolist()


def test_an_empty_batch_is_nobodys() -> None:
    with pytest.raises(ValueError, match="empty"):
        pad([], 0)
    assert pad([[]], 0).shape == torch.Size([1, 0])
