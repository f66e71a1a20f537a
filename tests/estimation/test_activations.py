"""What autograd saves, counted."""

from __future__ import annotations

import pytest
import torch

from lightning_peft.estimation.activations import saved_bytes
from lightning_peft.estimation.memory import nbytes
from lightning_peft.strategies import LoRA

ROWS, TOKENS = 4, 24


def test_a_saved_tensor_counts_once_and_weights_do_not() -> None:
    layer, x = torch.nn.Linear(8, 4), torch.randn(5, 8)
    with saved_bytes(layer) as saved:
        layer(x).sum()
        layer(x).sum()
        assert sum(saved.values()) == nbytes([x]) == 4 * 5 * 8
        layer(torch.randn(3, 8)).exp()  # another input, and exp's own output
        assert sum(saved.values()) == 4 * (5 * 8 + 3 * 8 + 3 * 4)


def test_checkpointing_keeps_inputs_of_blocks_and_one_block(
    estimated, real, measured, padded_batch
) -> None:
    """Against torch, whose checkpoints hold on to their inputs where no hook sees it."""

    def found(checkpointing: bool) -> int:
        return estimated(LoRA(8), gradient_checkpointing=checkpointing).activations

    module = real(LoRA(8))
    module.model.gradient_checkpointing_enable({"use_reentrant": False})
    module.model.enable_input_require_grads()
    outside = measured(module, padded_batch)
    inputs = 4 * ROWS * TOKENS * 128 * 4  # of four blocks, hidden size 128, float32
    block = (found(False) - outside) / 4
    assert found(True) == pytest.approx(outside + inputs + block, rel=0.1)
    assert found(True) < 0.6 * found(False)


def test_half_precision_bases_keep_adapters_in_single_precision(
    estimated, real, measured, padded_batch
) -> None:
    module = real(LoRA(8), dtype="bfloat16")
    found = estimated(LoRA(8), dtype="bfloat16")
    assert found.trained == nbytes([p for p in module.model.parameters() if p.requires_grad])
    assert found.activations == pytest.approx(measured(module, padded_batch), rel=0.1)
