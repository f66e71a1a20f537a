"""Kernels of other packages under adapters: bitsandbytes' few bits, Liger's fused layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities import move_data_to_device

from lightning_peft.adapters import adapter_layers
from lightning_peft.models.liger import apply_liger
from lightning_peft.models.loading import BaseSource, load_causal_lm
from lightning_peft.strategies import DropLoRA, LoRA
from lightning_peft.testing import random_batch, tiny_llama


def batch_on(device: torch.device) -> dict[str, torch.Tensor]:
    return move_data_to_device(random_batch(0), device)


@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantized_base_trains_close_to_the_whole_one(
    kind: str, tmp_path: Path, device: torch.device
) -> None:
    pytest.importorskip("bitsandbytes")
    tiny_llama(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    losses = []
    for quantization in (kind, None):
        source = BaseSource(str(tmp_path), quantization=quantization, device=device)
        model: Any = load_causal_lm(source).to(device)
        torch.manual_seed(0)
        DropLoRA(r=4, p=0.0).attach(model)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        run = []
        for _ in range(8):
            loss = model(**batch_on(device)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            run.append(float(loss))
        assert all(bool(layer.lora_B.any()) for layer in adapter_layers(model).values())
        losses.append(run)
    assert losses[0] == pytest.approx(losses[1], rel=0.1)
    assert losses[0][-1] < 0.9 * losses[0][0]


def test_liger_gives_the_models_own_loss_and_gradients(on_gpu: torch.device) -> None:
    pytest.importorskip("liger_kernel")
    found = []
    for fused in (False, True):
        model: Any = tiny_llama().to(on_gpu)
        if fused:
            apply_liger(model)
        torch.manual_seed(0)
        LoRA(r=4).attach(model)
        for layer in adapter_layers(model).values():
            torch.nn.init.normal_(layer.lora_B, std=0.1)
        loss = model(**batch_on(on_gpu)).loss
        loss.backward()
        found.append([loss.detach(), *(la.lora_A.grad for la in adapter_layers(model).values())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
