from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_peft.datamodules.loading.batches import EncodedDataset, PromptDataset, training_batch
from lightning_peft.datamodules.loading.examples import Encoder, Example, encode_cached

EOS = 2


def example(prompt: str, response: str = "", index: int = 0) -> Example:
    return Example(prompt, response, "capitals", index, "x")


def test_prompt_response_and_eos_are_joined_exactly(tokenizer: Any, byte_ids: Any) -> None:
    columns = Encoder(tokenizer, 64).encode([example("ab ", " cd")], True)
    assert columns["tokens"] == [[*byte_ids("ab "), *byte_ids(" cd"), EOS]]
    assert columns["prompt_length"] == [3]
    assert columns["cut"] == [0]


def test_boundary_holds_where_joint_tokenization_would_cross_it(make_tokenizer: Any) -> None:
    merging = make_tokenizer(merges=(("b", "c"),))
    columns = Encoder(merging, 64).encode([example("ab", "cd")], True)
    assert merging("abcd")["input_ids"] == [3 + 97, 259, 3 + 100]
    assert columns["tokens"] == [[3 + 97, 3 + 98, 3 + 99, 3 + 100, EOS]]


def test_bos_stands_in_front_only_where_the_tokenizer_puts_it(
    tokenizer: Any, make_tokenizer: Any, byte_ids: Any
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
    limit: int, kept: str, cut: int, tokenizer: Any, byte_ids: Any
) -> None:
    columns = Encoder(tokenizer, limit).encode([example("prompt", "yo")], True)
    assert columns["tokens"] == [[*byte_ids(kept + "yo"), EOS]]
    assert columns["prompt_length"] == [len(kept)]
    assert columns["cut"] == [cut]


def test_bos_survives_the_cut(make_tokenizer: Any, byte_ids: Any) -> None:
    encoder = Encoder(make_tokenizer(adds_bos=True), 6)
    tokens = encoder.encode([example("prompt", "yo")], True)["tokens"]
    assert tokens == [[1, *byte_ids("ptyo"), EOS]]
    assert encoder.encode([example("prompt!!")], False)["tokens"] == [[1, *byte_ids("mpt!!")]]


def test_a_response_over_the_limit_leaves_no_tokens(tokenizer: Any, byte_ids: Any) -> None:
    examples = [example("p", "ok"), example("p", "too long", index=41)]
    columns = Encoder(tokenizer, 8).encode(examples, True)
    assert columns["tokens"] == [[*byte_ids("pok"), EOS], []]


def conversation(**changes: Any) -> Example:
    turns = {"history": (("ab", "c"), ("d", "ef"))}
    return Example("g", "hi", "chat", 0, **{**turns, **changes})


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
    limit: int, text: str, spans: list[int], tokenizer: Any, byte_ids: Any, tmp_path: Path
) -> None:
    encoder = Encoder(tokenizer, limit)
    data = dataset(encoder, [conversation()], "response", tmp_path)
    ids = [EOS if c == "|" else byte_ids(c)[0] for c in text]
    assert data[0] == (ids, spans)
    labels = data.collate([data[0]])["labels"]
    learnt = {p for b, e in zip(spans[::2], spans[1::2], strict=True) for p in range(b, e)}
    assert labels.tolist() == [[ids[i] if i in learnt else -100 for i in range(len(ids))]]
    assert data.count_targets([0]) == int((labels[:, 1:] != -100).sum())


def test_a_closed_response_gets_no_eos_and_a_bos_of_its_own_is_not_doubled(
    make_tokenizer: Any, byte_ids: Any
) -> None:
    encoder = Encoder(make_tokenizer(adds_bos=True), 64)
    closed = conversation(history=(("<s>ab", "c"),), closed=True)
    assert encoder.encode([closed], True)["tokens"] == [[1, *byte_ids("abcghi")]]


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
    loss_on: str, make_tokenizer: Any, tmp_path: Path
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
    loss_on: str, adds_bos: bool, make_tokenizer: Any, tmp_path: Path
) -> None:
    encoder = Encoder(make_tokenizer(adds_bos=adds_bos), 10)
    texts = [("abc", "de"), ("", "f"), ("g", ""), ("a long prompt", "h"), ("", "")]
    data = dataset(encoder, [example(*t) for t in texts], loss_on, tmp_path)
    for rows in ([0], [1], [2], [3], [4], [0, 1, 2, 3, 4]):
        labels = data.collate(data.__getitems__(rows))["labels"]
        assert data.count_targets(rows) == int((labels[:, 1:] != -100).sum())


def test_a_cached_text_is_not_encoded_again(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = [example("ab", "c", i) for i in range(3)]
    first = encode_cached(Encoder(tokenizer, 64), examples, True, tmp_path).to_dict()
    encode: Callable[..., Any] = Encoder.encode
    calls = []
    monkeypatch.setattr(Encoder, "encode", lambda *a: calls.append(1) or encode(*a))
    assert encode_cached(Encoder(tokenizer, 64), examples, True, tmp_path).to_dict() == first
    assert calls == []


def test_the_cache_knows_texts_limit_and_tokenizer_apart(
    tokenizer: Any, make_tokenizer: Any, tmp_path: Path
) -> None:
    base = [example("ab", "c")]
    variants = [
        (tokenizer, 64, base, True),
        (tokenizer, 64, base, False),
        (tokenizer, 3, base, True),
        (tokenizer, 64, [example("a", "bc")], True),
        (make_tokenizer(merges=(("a", "b"),)), 64, base, True),
        (make_tokenizer(adds_bos=True), 64, base, True),
    ]
    seen = []
    for tok, limit, examples, with_response in variants * 2:
        table = encode_cached(Encoder(tok, limit), examples, with_response, tmp_path)
        seen.append((table["tokens"][0], table["prompt_length"][0]))
    assert seen[:6] == seen[6:]
    assert len({str(s) for s in seen}) == 6
    assert len(list(tmp_path.glob("*.arrow"))) == 6


def test_a_call_that_pads_does_not_change_the_fingerprint(make_tokenizer: Any) -> None:
    fresh = make_tokenizer()
    before = Encoder(fresh, 64).fingerprint()
    fresh(["a", "bb"], padding=True, truncation=True, max_length=4)
    assert Encoder(fresh, 64).fingerprint() == before


def test_a_tokenizer_without_eos_is_refused(make_tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=r"has no EOS token.*set its eos_token"):
        Encoder(make_tokenizer(eos_token=None), 64)


def test_prompts_are_padded_on_the_left_with_their_records(byte_ids: Any) -> None:
    examples = [Example("abc", "", "t", 4, "x"), Example("d", "", "t", 9, "y")]
    data = PromptDataset([byte_ids("abc"), byte_ids("d")], examples, pad_id=0)
    batch = data.collate([data[1], data[0]])
    assert batch["input_ids"].tolist() == [[0, 0, *byte_ids("d")], byte_ids("abc")]
    assert batch["attention_mask"].tolist() == [[0, 0, 1], [1, 1, 1]]
    assert batch["input_ids"].dtype == torch.long
    rest = {k: v for k, v in batch.items() if not isinstance(v, torch.Tensor)}
    assert rest == {"index": [9, 4], "prompt": ["d", "abc"], "expected": ["y", "x"], "task": "t"}
    assert data.longest_first() == [0, 1]
