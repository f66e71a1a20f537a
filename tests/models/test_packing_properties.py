"""Records that share a row have the very losses that they have alone, whatever their lengths."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from lightning_peft.assets import resolve_model
from lightning_peft.datamodules.loading.batches import training_batch
from lightning_peft.datamodules.loading.packing import packed_batch
from lightning_peft.models.loss import TargetLoss, target_logits, token_loss
from lightning_peft.models.packing import model_inputs

SLOW = settings(derandomize=True, deadline=None, max_examples=12)
LENGTHS = st.lists(st.integers(1, 12), min_size=2, max_size=6)


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def embedded(request: Any) -> Any:
    name = resolve_model("tiny_llama")
    return AutoModelForCausalLM.from_pretrained(name, attn_implementation=request.param).eval()


def rows_of(lengths: list[int]) -> list[tuple[list[int], list[int]]]:
    generator = torch.Generator().manual_seed(sum(lengths))
    ids = [torch.randint(3, 259, (n,), generator=generator).tolist() for n in lengths]
    return [(row, [len(row) // 3, len(row)]) for row in ids]


def losses(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """The loss of every token, 0 where none is predicted, (batch, tokens - 1)."""
    with torch.no_grad():
        logits = model(**model_inputs(batch), use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.transpose(1, 2), batch["labels"][:, 1:], reduction="none")


@SLOW
@given(LENGTHS, st.integers(1, 3))
def test_each_record_has_the_loss_that_it_has_alone(
    embedded: Any, lengths: list[int], packs: int
) -> None:
    rows = rows_of(lengths)
    shared = [rows[i::packs] for i in range(min(packs, len(rows)))]
    found = losses(embedded, packed_batch(shared))
    for number, pack in enumerate(shared):
        begin = 0
        for row in pack:
            alone = losses(embedded, training_batch([row], 0))[0]
            end = begin + len(row[0]) - 1
            torch.testing.assert_close(found[number, begin:end], alone, rtol=1e-4, atol=1e-5)
            begin = end + 1


@SLOW
@given(LENGTHS)
def test_the_sum_is_that_of_the_padded_batch_by_either_way_to_it(
    embedded: Any, lengths: list[int]
) -> None:
    rows = rows_of(lengths)
    padded, packed = training_batch(rows, 0), packed_batch([rows])
    with torch.no_grad():
        total, count = TargetLoss()(embedded, padded)
        others = [
            TargetLoss()(embedded, packed),
            token_loss(*target_logits(embedded, padded)),
            token_loss(*target_logits(embedded, packed)),
        ]
    for other, counted in others:
        assert int(counted) == int(count) == sum(len(r) - max(len(r) // 3, 1) for r, _ in rows)
        torch.testing.assert_close(other, total, rtol=1e-4, atol=1e-4)
