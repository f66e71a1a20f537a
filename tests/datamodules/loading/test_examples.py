from __future__ import annotations

from typing import Any

import pytest

from lightning_peft.datamodules.loading.examples import Encoder

EOS = 2


def test_prompt_response_and_eos_are_joined_exactly(
    tokenizer: Any, byte_ids: Any, example: Any
) -> None:
    columns = Encoder(tokenizer, 64).encode([example("ab ", " cd")], True)
    assert columns["tokens"] == [[*byte_ids("ab "), *byte_ids(" cd"), EOS]]
    assert columns["prompt_length"] == [3]
    assert columns["cut"] == [0]


def test_boundary_holds_where_joint_tokenization_would_cross_it(
    make_tokenizer: Any, example: Any
) -> None:
    merging = make_tokenizer(merges=(("b", "c"),))
    columns = Encoder(merging, 64).encode([example("ab", "cd")], True)
    assert merging("abcd")["input_ids"] == [3 + 97, 259, 3 + 100]
    assert columns["tokens"] == [[3 + 97, 3 + 98, 3 + 99, 3 + 100, EOS]]


def test_bos_stands_in_front_only_where_the_tokenizer_puts_it(
    tokenizer: Any, make_tokenizer: Any, byte_ids: Any, example: Any
) -> None:
    assert Encoder(tokenizer, 64).prefix == []
    encoder = Encoder(make_tokenizer(adds_bos=True), 64)
    columns = encoder.encode([example("ab", "c")], True)
    assert columns["tokens"] == [[1, *byte_ids("abc"), EOS]]
    assert columns["prompt_length"] == [3]
    assert encoder.encode([example("ab", "c")], False)["tokens"] == [[1, *byte_ids("ab")]]


@pytest.mark.parametrize(
    ("limit", "kept", "cut"), [(9, "prompt", 0), (8, "rompt", 1), (4, "t", 5), (3, "", 6)]
)
def test_a_long_prompt_is_cut_from_the_left(
    limit: int, kept: str, cut: int, tokenizer: Any, byte_ids: Any, example: Any
) -> None:
    columns = Encoder(tokenizer, limit).encode([example("prompt", "yo")], True)
    assert columns["tokens"] == [[*byte_ids(kept + "yo"), EOS]]
    assert columns["prompt_length"] == [len(kept)]
    assert columns["cut"] == [cut]


def test_bos_survives_the_cut(make_tokenizer: Any, byte_ids: Any, example: Any) -> None:
    encoder = Encoder(make_tokenizer(adds_bos=True), 6)
    tokens = encoder.encode([example("prompt", "yo")], True)["tokens"]
    assert tokens == [[1, *byte_ids("ptyo"), EOS]]
    assert encoder.encode([example("prompt!!")], False)["tokens"] == [[1, *byte_ids("mpt!!")]]


def test_a_response_over_the_limit_leaves_no_tokens(
    tokenizer: Any, byte_ids: Any, example: Any
) -> None:
    examples = [example("p", "ok"), example("p", "too long", index=41)]
    columns = Encoder(tokenizer, 8).encode(examples, True)
    assert columns["tokens"] == [[*byte_ids("pok"), EOS], []]


def test_a_closed_response_gets_no_eos_and_a_bos_of_its_own_is_not_doubled(
    make_tokenizer: Any, byte_ids: Any, conversation: Any
) -> None:
    encoder = Encoder(make_tokenizer(adds_bos=True), 64)
    closed = conversation(history=(("<s>ab", "c"),), closed=True)
    assert encoder.encode([closed], True)["tokens"] == [[1, *byte_ids("abcghi")]]


def test_a_tokenizer_without_eos_is_refused(make_tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=r"has no EOS token.*set its eos_token"):
        Encoder(make_tokenizer(eos_token=None), 64)
