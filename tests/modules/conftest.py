"""The embedded model and prompts for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_peft.assets import resolve_model
from lightning_peft.datamodules import Example
from lightning_peft.datamodules.batches import PromptDataset
from lightning_peft.datamodules.examples import Encoder


@pytest.fixture
def model() -> Any:
    """The embedded model in eval, float32."""
    return AutoModelForCausalLM.from_pretrained(resolve_model("tiny_llama")).eval()


@pytest.fixture(scope="session")
def encoder() -> Encoder:
    return Encoder(AutoTokenizer.from_pretrained(resolve_model("tiny_llama")), max_length=600)


@pytest.fixture(scope="session")
def ask(encoder: Encoder) -> Callable[[Sequence[str]], dict[str, Any]]:
    """Makes the batch of prompts that a test loader would."""

    def collate(prompts: Sequence[str]) -> dict[str, Any]:
        examples = [Example(prompt, "", "t", i) for i, prompt in enumerate(prompts)]
        tokens = encoder.encode(examples, with_response=False)["tokens"]
        data = PromptDataset(tokens, examples, encoder.pad_id)
        return data.collate([data[i] for i in range(len(data))])

    return collate
