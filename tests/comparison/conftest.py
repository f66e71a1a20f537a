"""What the tests of comparisons share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from lightning_peft.assets import TINY_LLAMA
from lightning_peft.comparison.plan import Resolver


@pytest.fixture(scope="session")
def resolver() -> Iterator[Resolver]:
    """One whose parser is made once for all tests."""
    import sys

    before = sys.argv
    sys.argv = ["lightning-peft"]
    yield Resolver()
    sys.argv = before


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LLaMA, smaller than the embedded one, with its tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=259,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(TINY_LLAMA).save_pretrained(folder)
    return folder
