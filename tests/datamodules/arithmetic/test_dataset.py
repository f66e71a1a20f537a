from __future__ import annotations

import time
from typing import Any

import pytest

from lightning_peft.datamodules import ArithmeticDataModule


def test_a_training_row_token_for_token(
    tokenizer: Any, byte_ids: Any, solve: Any, module: Any
) -> None:
    batch = next(iter(module(tokenizer).train_dataloader()))
    ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
    prompt = tokenizer.decode(ids[:8])
    assert ids == [*byte_ids(prompt), *byte_ids(solve(prompt)), 2]
    assert labels == [-100] * 8 + [*byte_ids(solve(prompt)), 2]
    assert batch["attention_mask"].unique().tolist() == [1]
    assert batch["num_target_tokens"].item() == 5 * 16


@pytest.mark.parametrize("task", ["subtraction", "operators"])
@pytest.mark.parametrize("kind", ["bytes", "bos", "merging"])
def test_every_tokenizer_gives_the_same_texts(
    task: str, kind: str, make_tokenizer: Any, solve: Any, decoded: Any, module: Any
) -> None:
    merges = (("0", "9"), ("1", "2"), ("3", "-"), ("4", "=")) if kind == "merging" else ()
    tok = make_tokenizer(merges=merges, adds_bos=kind == "bos")
    data = module(tok, task=task, batch_size=64)
    train = data.training_sets()[0]
    assert (train.table is None) == (kind == "merging")  # type: ignore[attr-defined]
    for _, batch in zip(range(5), data.train_dataloader(), strict=False):
        pairs = decoded(tok, batch)
        assert [a for _, a in pairs] == [solve(p.removeprefix("<s>")) for p, _ in pairs]
        assert all(p.startswith("<s>") == (kind == "bos") for p, _ in pairs)
        labels = batch["labels"][:, 1:]
        assert batch["num_target_tokens"].item() == int((labels != -100).sum())


def test_building_and_batching_are_fast(tokenizer: Any) -> None:
    def seconds(work: Any) -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    # The best of several, and twice what is wanted: the machine may be busy.
    data = [ArithmeticDataModule(tokenizer=tokenizer, batch_size=128) for _ in range(5)]
    assert min(seconds(lambda d=d: d.setup("fit")) for d in data) < 0.6
    batches = iter(data[0].train_dataloader())
    next(batches)
    assert min(seconds(lambda: next(batches)) for _ in range(20)) < 0.004
