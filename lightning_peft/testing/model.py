"""A small random LLaMA and batches for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Batch = dict[str, Tensor]
VOCABULARY = 61


def tiny_llama(seed: int = 0, **changes: Any) -> Any:
    """A random LLaMA with two layers and grouped-query attention, the same for one seed.

    Args:
        seed: Of its weights.
        changes: Entries of its configuration.

    Returns:
        The model, in training mode.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32,
        "initializer_range": 0.1,
        "tie_word_embeddings": False,
        "use_cache": False,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**{**shape, **changes})).train()


def random_batch(seed: int, rows: int = 4, length: int = 10) -> Batch:
    """Rows of random tokens and random length, padded on the right, padding without labels.

    Args:
        seed: The same batch for the same seed.
        rows: Examples.
        length: Of the longest possible row.

    Returns:
        ``input_ids``, ``attention_mask`` and ``labels``, (rows, length) each.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCABULARY, (rows, length), generator=generator)
    lengths = torch.randint(length // 2, length + 1, (rows, 1), generator=generator)
    mask = (torch.arange(length) < lengths).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
