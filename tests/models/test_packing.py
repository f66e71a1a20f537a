"""Documents that share a row know nothing of each other, and train as they would apart."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_peft.adapters import observe_inputs
from lightning_peft.datamodules.loading.batches import training_batch
from lightning_peft.datamodules.loading.packing import packed_batch
from lightning_peft.models.packing import model_inputs, one_row
from lightning_peft.modules.causal_lm import CausalLMModule
from lightning_peft.strategies import LoRA

LENGTHS = [9, 4, 5, 3, 2, 7]


@pytest.fixture(params=["sdpa", "eager"])
def module(request) -> CausalLMModule:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        attn_implementation=request.param,
    )
    module = CausalLMModule("tiny_llama", adapter=LoRA(r=4))
    model = LlamaForCausalLM(config).train()
    module.adapter.attach(model)
    for layer in model.modules():
        if hasattr(layer, "lora_B"):
            nn.init.normal_(layer.lora_B, std=0.3)
    module.model = model
    return module


def rows() -> list:
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(3, 40, (n,), generator=generator).tolist() for n in LENGTHS]
    return [(tokens, [len(tokens) // 2, len(tokens)]) for tokens in ids]


def packs() -> list:
    """Rows of 9, 11 and 10 tokens, of one record, three and two."""
    documents = rows()
    return [documents[:1], documents[1:3] + documents[4:5], documents[3:4] + documents[5:]]


def logits(module: CausalLMModule, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return module.model(**model_inputs(batch), use_cache=False).logits


def test_changing_a_document_leaves_the_others_as_they_were(module) -> None:
    batch = packed_batch(packs(), 0)
    before = logits(module, batch)
    positions = batch["position_ids"]
    number = (positions == 0).cumsum(1)  # of the document in its row
    for row in range(len(positions)):
        for document in number[row].unique():
            inside = torch.zeros_like(positions, dtype=torch.bool)
            inside[row] = number[row] == document
            changed = batch["input_ids"].clone()
            changed[inside] = (changed[inside] + 7) % 40
            after = logits(module, {**batch, "input_ids": changed})
            assert torch.equal(before[~inside], after[~inside])
            assert not torch.equal(before[inside], after[inside])


def test_a_packed_step_is_the_padded_step(module) -> None:
    grads = []
    for batch in (packed_batch(packs(), 0), training_batch(rows(), 0)):
        module.model.zero_grad()
        total, count = module.target_loss(batch)
        (total / count).backward()
        grads.append([total, *(p.grad for p in module.model.parameters() if p.requires_grad)])
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_importance_counts_the_same_tokens_packed_and_padded(module) -> None:
    seen = []
    for batch in (packed_batch(packs(), 0), training_batch(rows(), 0)):
        found: dict[str, tuple[int, float]] = {}

        def add(name, layer, x, found=found) -> None:
            found[name] = len(x), float(layer.delta_sq_norm(x).sum())

        with observe_inputs(module.model, add):
            logits(module, batch)
        seen.append(found)
    packed, padded = seen
    assert packed.keys() == padded.keys()
    for name in padded:
        assert packed[name][0] == padded[name][0] == sum(LENGTHS)
        assert packed[name][1] == pytest.approx(padded[name][1], rel=1e-4)


def test_flash_attention_gets_one_row(module) -> None:
    batch = packed_batch(packs(), 0)
    assert one_row(batch, module.model.config) is batch
    module.model.config._attn_implementation = "flash_attention_2"
    flat = one_row(batch, module.model.config)
    module.model.config._attn_implementation = "eager"
    assert flat["input_ids"].shape == flat["labels"].shape == (1, 33)
    total, count = module.target_loss(batch)
    flat_total, flat_count = module.target_loss(flat)
    assert count == flat_count
    torch.testing.assert_close(total, flat_total)
