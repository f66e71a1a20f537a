"""Small models and what a real step of them takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from lightning_peft.estimation import Estimate, estimate
from lightning_peft.estimation.activations import saved_bytes
from lightning_peft.modules import CausalLMModule
from lightning_peft.strategies import (
    AdaLoRA,
    AdapterStrategy,
    DoRA,
    DropLoRA,
    FullFineTuning,
    GaLore,
    LoRA,
    LoRADrop,
    MiLoRA,
    PiSSA,
    PrunedLoRA,
    SparseAdapter,
    TiedLoRA,
    VeRA,
)

ROWS, TOKENS = 4, 24
STRATEGIES: dict[str, Callable[[], AdapterStrategy]] = {
    "LoRA": lambda: LoRA(8, target_modules=["q_proj", "down_proj"]),
    "DropLoRA": lambda: DropLoRA(8, 0.3),
    "masks by step": lambda: DropLoRA(8, 0.3, mask="step"),
    "PrunedLoRA": lambda: PrunedLoRA(16, target_r=4, start_step=5),
    "LoRADrop": lambda: LoRADrop(8),
    "DoRA": lambda: DoRA(8, lora_dropout=0.1),
    "PiSSA": lambda: PiSSA(8),
    "MiLoRA": lambda: MiLoRA(8),
    "VeRA": lambda: VeRA(32),
    "TiedLoRA": lambda: TiedLoRA(8),
    "SparseAdapter": lambda: SparseAdapter(8),
    "AdaLoRA": lambda: AdaLoRA(12, 8, total_step=100),
    "GaLore": lambda: GaLore(8),
    "FullFineTuning": FullFineTuning,
}


@pytest.fixture
def strategy() -> Callable[[str], AdapterStrategy]:
    """Makes a strategy by its name above."""
    return lambda name: STRATEGIES[name]()


@pytest.fixture
def padded_batch() -> dict[str, torch.Tensor]:
    """A micro-batch of four rows of 24 tokens."""
    ids = torch.randint(3, 250, (ROWS, TOKENS))
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


@pytest.fixture
def estimated() -> Callable[..., Estimate]:
    """Estimates a run of the embedded model with micro-batches like ``padded_batch``."""

    def make(adapter: AdapterStrategy, **arguments: Any) -> Estimate:
        module = CausalLMModule("tiny_llama", adapter=adapter, **arguments)
        return estimate(module, ROWS, TOKENS)

    return make


@pytest.fixture
def real() -> Callable[..., Any]:
    """Makes the module with its model, loaded and adapted."""

    def make(adapter: AdapterStrategy, **arguments: Any) -> Any:
        module = CausalLMModule("tiny_llama", adapter=adapter, **arguments)
        module.model = module.load_base()
        module.adapter.attach(module.model)
        return module

    return make


@pytest.fixture
def measured() -> Callable[[Any, dict[str, torch.Tensor]], int]:
    """Bytes that the forward pass of a real module keeps."""

    def measure(module: Any, batch: dict[str, torch.Tensor]) -> int:
        with saved_bytes(module.model) as saved:
            module.target_loss(batch)
            return sum(saved.values())

    return measure
