from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_peft.datamodules.loading.batches import (
    EncodedDataset,
    PromptDataset,
    Subset,
    training_batch,
)
from lightning_peft.datamodules.loading.examples import Encoder, Example, encode_cached

EOS = 2


@pytest.mark.parametrize(
    ("limit", "text", "spans"),
    [
        (20, "abc|def|ghi|", [2, 4, 5, 8, 9, 12]),
        (11, "bc|def|ghi|", [1, 3, 4, 7, 8, 11]),
        (9, "|def|ghi|", [0, 1, 2, 5, 6, 9]),
        (5, "|ghi|", [0, 0, 0, 1, 2, 5]),
        (3, "hi|", [0, 0, 0, 0, 0, 3]),
    ],
)
def test_every_response_of_a_conversation_is_learnt(
    limit: int,
    text: str,
    spans: list[int],
    tokenizer: Any,
    byte_ids: Any,
    tmp_path: Path,
    conversation: Any,
) -> None:
    encoder = Encoder(tokenizer, limit)
    data = dataset(encoder, [conversation()], "response", tmp_path)
    ids = [EOS if c == "|" else byte_ids(c)[0] for c in text]
    assert data[0] == (ids, spans)
    labels = data.collate([data[0]])["labels"]
    learnt = {p for b, e in zip(spans[::2], spans[1::2], strict=True) for p in range(b, e)}
    assert labels.tolist() == [[ids[i] if i in learnt else -100 for i in range(len(ids))]]
    assert data.count_targets([0]) == int((labels[:, 1:] != -100).sum())


def test_labels_are_the_response_and_its_eos(tokenizer: Any, byte_ids: Any) -> None:
    rows = [
        ([*byte_ids("ab"), *byte_ids("cde"), EOS], [2, 6]),
        ([*byte_ids("a"), *byte_ids("c"), EOS], [1, 3]),
    ]
    batch = training_batch(rows, pad_id=0)
    a, b, c, d, e = byte_ids("abcde")
    assert batch["input_ids"].tolist() == [[a, b, c, d, e, EOS], [a, c, EOS, 0, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1] * 6, [1, 1, 1, 0, 0, 0]]
    no = -100
    assert batch["labels"].tolist() == [[no, no, c, d, e, EOS], [no, c, EOS, no, no, no]]


def dataset(
    encoder: Encoder, examples: list[Example], loss_on: str, folder: Path
) -> EncodedDataset:
    table = encode_cached(encoder, examples, True, folder)
    return EncodedDataset(table, [e.task for e in examples], encoder.pad_id, loss_on)


@pytest.mark.parametrize("loss_on", ["response", "all"])
def test_pad_is_never_a_label_where_it_is_eos(
    loss_on: str, make_tokenizer: Any, tmp_path: Path, example: Any
) -> None:
    encoder = Encoder(make_tokenizer(pad_token=None), 64)
    assert encoder.pad_id == EOS
    data = dataset(encoder, [example("abc", "de"), example("a", "b")], loss_on, tmp_path)
    batch = data.collate(data.__getitems__([0, 1]))
    assert batch["input_ids"][1].tolist()[2:] == [EOS] * 4
    assert batch["attention_mask"][1].tolist() == [1, 1, 1, 0, 0, 0]
    assert batch["labels"][1].tolist()[2:] == [EOS, -100, -100, -100]
    assert batch["labels"][0].tolist()[-1] == EOS


@pytest.mark.parametrize("loss_on", ["response", "all"])
@pytest.mark.parametrize("adds_bos", [False, True])
def test_counted_targets_are_the_labels_that_are_predicted(
    loss_on: str, adds_bos: bool, make_tokenizer: Any, tmp_path: Path, example: Any
) -> None:
    encoder = Encoder(make_tokenizer(adds_bos=adds_bos), 10)
    texts = [("abc", "de"), ("", "f"), ("g", ""), ("a long prompt", "h"), ("", "")]
    data = dataset(encoder, [example(*t) for t in texts], loss_on, tmp_path)
    for rows in ([0], [1], [2], [3], [4], [0, 1, 2, 3, 4]):
        labels = data.collate(data.__getitems__(rows))["labels"]
        assert data.count_targets(rows) == int((labels[:, 1:] != -100).sum())


def test_prompts_are_padded_on_the_left_with_their_records(byte_ids: Any, data: Any) -> None:
    examples = [Example("abc", "", "t", 4, "x"), Example("d", "", "t", 9, "y")]
    data = PromptDataset([byte_ids("abc"), byte_ids("d")], examples, pad_id=0)
    batch = data.collate([data[1], data[0]])
    assert batch["input_ids"].tolist() == [[0, 0, *byte_ids("d")], byte_ids("abc")]
    assert batch["attention_mask"].tolist() == [[0, 0, 1], [1, 1, 1]]
    assert batch["input_ids"].dtype == torch.long
    rest = {k: v for k, v in batch.items() if not isinstance(v, torch.Tensor)}
    assert rest == {"index": [9, 4], "prompt": ["d", "abc"], "expected": ["y", "x"], "task": "t"}
    assert data.longest_first() == [0, 1]


def rows_of(batch: dict[str, Any]) -> list[int]:
    return batch["input_ids"][:, 0].tolist()


def test_a_subset_is_its_rows(lengths: Any, data: Any) -> None:
    subset = Subset(data, [5, 3, 100])
    assert len(subset) == 3
    assert rows_of(subset.collate(subset.__getitems__([2, 0]))) == [100, 5]
    assert subset.count_targets([0, 1]) == 3 + 1
    assert subset.lengths() is not None
    assert subset.lengths().tolist() == lengths[[5, 3, 100]].tolist()  # type: ignore[union-attr]
    assert subset.strata().tolist() == [0, 3, 0]
