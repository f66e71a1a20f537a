"""What several tests share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from lightning_peft import testing

# The tests' models are so small that a second thread costs more than it computes.
torch.set_num_threads(1)


@pytest.fixture
def tiny_llama() -> Callable[..., Any]:
    """Makes a random LLaMA with grouped-query attention: ``tiny_llama(seed, hidden_size=…)``."""
    return testing.tiny_llama


@pytest.fixture
def random_batch() -> Callable[..., dict[str, torch.Tensor]]:
    """Makes a right-padded batch for it: ``random_batch(seed, rows, length)``."""
    return testing.random_batch


@pytest.fixture
def logits() -> Callable[..., torch.Tensor]:
    """Logits of a model in eval at the attended positions of a batch, (tokens, vocabulary)."""

    def compute(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        was_training = model.training
        model.eval()
        with torch.no_grad():
            out = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        model.train(was_training)
        return out[batch["attention_mask"].bool()]

    return compute
