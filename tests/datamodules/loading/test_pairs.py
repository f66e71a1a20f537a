from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lightning_peft.datamodules.loading.labelled import Labelled
from lightning_peft.datamodules.loading.pairs import PairEncoder, longest_first


@pytest.mark.parametrize(
    ("lengths", "room", "kept"),
    [
        ((9, 2), 20, (9, 2)),
        ((9, 2), 8, (6, 2)),
        ((2, 9), 8, (2, 6)),
        ((9, 5), 8, (4, 4)),
        ((9, 9), 7, (4, 3)),
        ((0, 9), 3, (0, 3)),
    ],
)
def test_the_longer_text_is_cut_first(
    lengths: tuple[int, int], room: int, kept: tuple[int, int]
) -> None:
    assert longest_first(*lengths, room) == kept


def test_no_token_to_pad_with_is_said(make_tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="has neither a pad nor an EOS token"):
        PairEncoder(make_tokenizer(pad_token=None, eos_token=None), 20)


def test_pairs_by_our_template_lose_the_end_of_the_longer_text(
    tokenizer: Any, byte_ids: Any
) -> None:
    encoder = PairEncoder(tokenizer, 20, ("A", "B"))
    assert (encoder.pairs, encoder.template) == (False, "A: {first}\nB: {second}")
    columns = encoder.encode(["abcdefghijklmnop", "a"], ["xy", "z"])
    assert columns["tokens"] == [byte_ids("A: abcdefghijk\nB: xy"), byte_ids("A: a\nB: z")]
    assert columns["cut"] == [5, 0]


def test_single_texts_have_the_tokenizers_own_form(make_tokenizer: Any, byte_ids: Any) -> None:
    columns = PairEncoder(make_tokenizer(adds_bos=True), 4).encode(["ab", "abcdef"], None)
    assert columns == {"tokens": [[1, *byte_ids("ab")], [1, *byte_ids("abc")]], "cut": [0, 3]}


def test_records_are_encoded_once(tokenizer: Any, tmp_path: Path, monkeypatch: Any) -> None:
    records = [Labelled("a", "b", 0, 0), Labelled("c", "d", 1, 1)]
    first = PairEncoder(tokenizer, 30).cached(records, str(tmp_path))["tokens"][:]
    monkeypatch.setattr(PairEncoder, "encode", None)
    assert PairEncoder(tokenizer, 30).cached(records, str(tmp_path))["tokens"][:] == first
    assert len(PairEncoder(tokenizer, 30).cached([], str(tmp_path))) == 0
