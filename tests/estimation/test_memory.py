"""Bytes of tensors and of frozen bases."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_peft.estimation.memory import QUANTIZED, base_bytes, nbytes, value_bytes


def test_storage_that_several_share_counts_once() -> None:
    tensor = torch.zeros(10, 10)
    assert nbytes([tensor, tensor[2:], tensor.T]) == 400
    assert nbytes([tensor, torch.zeros(3, dtype=torch.float64)]) == 424
    assert nbytes([]) == 0


def test_values_are_a_views_own() -> None:
    tensor = torch.zeros(10, 10, device="meta")
    assert value_bytes([tensor[2:]]) == 320
    assert value_bytes([tensor, tensor, tensor[:1]]) == 440


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(16, 32, bias=False).requires_grad_(False)
        self.head = nn.Linear(32, 8, bias=False).requires_grad_(False)
        self.trained = nn.Linear(16, 16)
        self.register_buffer("counts", torch.zeros(5))

    def get_output_embeddings(self) -> nn.Module:
        return self.head


def test_a_base_is_what_does_not_train_and_its_buffers() -> None:
    assert base_bytes(Model(), None) == 4 * (16 * 32 + 32 * 8 + 5)


@pytest.mark.parametrize(("kind", "weight"), [("int8", 1.0), ("nf4", 0.5 + 1 / 64 + 4 / 16384)])
def test_a_quantized_base_keeps_its_output_layer_whole(kind: str, weight: float) -> None:
    assert QUANTIZED[kind] == weight
    assert base_bytes(Model(), kind) == round(weight * 16 * 32) + 4 * (32 * 8 + 5)
