"""The small LLaMA and its batches: the same for one seed, and nobody else's random numbers."""

from __future__ import annotations

import torch

from lightning_peft.testing import random_batch, tiny_llama


def test_a_seed_gives_the_same_weights_and_leaves_the_random_stream_alone() -> None:
    before = torch.get_rng_state()
    one, same, other = tiny_llama(3), tiny_llama(3), tiny_llama(4)
    assert torch.equal(torch.get_rng_state(), before)
    first = one.model.layers[0].self_attn.q_proj.weight
    assert torch.equal(first, same.model.layers[0].self_attn.q_proj.weight)
    assert not torch.equal(first, other.model.layers[0].self_attn.q_proj.weight)
    assert one.training


def test_its_shape_is_what_other_tests_count_on() -> None:
    model = tiny_llama()
    attention = model.model.layers[1].self_attn
    assert attention.q_proj.weight.shape == (32, 32)
    assert attention.k_proj.weight.shape == (16, 32)  # grouped queries
    assert model.lm_head.weight.shape == (61, 32)
    assert len(tiny_llama(num_hidden_layers=3).model.layers) == 3


def test_a_batch_is_padded_on_the_right_and_padding_has_no_labels() -> None:
    batch, again = random_batch(7, rows=5, length=8), random_batch(7, rows=5, length=8)
    assert all(torch.equal(batch[key], again[key]) for key in batch)
    assert not torch.equal(batch["input_ids"], random_batch(8, 5, 8)["input_ids"])
    mask = batch["attention_mask"]
    lengths = mask.sum(1)
    assert mask.shape == (5, 8)
    assert 4 <= lengths.min() <= lengths.max() <= 8
    assert torch.equal(mask, (torch.arange(8) < lengths[:, None]).long())
    assert torch.equal(batch["labels"] == -100, mask == 0)
    assert torch.equal(batch["labels"][mask.bool()], batch["input_ids"][mask.bool()])
