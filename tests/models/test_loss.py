"""The loss in chunks against logits and cross-entropy, values and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_peft.models.loss import chunked_loss, plain_head, token_loss
from lightning_peft.modules.causal_lm import CausalLMModule
from lightning_peft.strategies import LoRA

pytestmark = pytest.mark.skipif(
    not hasattr(F, "linear_cross_entropy"), reason="torch has no linear_cross_entropy"
)


@pytest.mark.parametrize("rows", [1, 255, 700])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_chunks_give_the_loss_and_gradient_of_all_logits(
    monkeypatch, rows, bias, dtype, tolerance
) -> None:
    monkeypatch.setattr("lightning_peft.models.loss._LOGITS", 0)
    torch.manual_seed(0)
    head = nn.Linear(16, 50, bias=bias, dtype=dtype).requires_grad_(False)
    hidden = torch.randn(rows, 16, dtype=dtype, requires_grad=True)
    targets = torch.randint(50, (rows,))
    ours = chunked_loss(hidden, head, targets)
    (ours / rows).backward()
    grad, hidden.grad = hidden.grad, None
    theirs, count = token_loss(head(hidden).float()[None], targets[None])
    (theirs / rows).backward()
    assert count == rows
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=0)
    scale = float(hidden.grad.abs().max())
    torch.testing.assert_close(grad, hidden.grad, rtol=tolerance, atol=tolerance * scale)


def test_no_target_gives_a_loss_of_zero_that_has_a_gradient() -> None:
    hidden = torch.randn(0, 16, requires_grad=True)
    loss = chunked_loss(hidden, nn.Linear(16, 50), torch.zeros(0, dtype=torch.long))
    loss.backward()
    assert loss == 0


def module_of(model: nn.Module) -> CausalLMModule:
    module = CausalLMModule("tiny_llama")
    module.adapter.attach(model)
    for layer in model.modules():
        if hasattr(layer, "lora_B"):
            nn.init.normal_(layer.lora_B, std=0.1)
    module.model = model
    return module


def batch_of(random_batch) -> dict:
    batch = random_batch(1)
    labels = batch["input_ids"].clone()
    labels[:, ::3] = -100
    return {**batch, "labels": labels}


def gradients(module: CausalLMModule, batch: dict) -> tuple:
    module.model.zero_grad()
    total, count = module.target_loss(batch)
    (total / count).backward()
    return total, count, [p.grad for p in module.model.parameters() if p.requires_grad]


def test_a_step_is_the_same_with_and_without_logits(tiny_llama, random_batch) -> None:
    torch.manual_seed(0)
    module, batch = module_of(tiny_llama()), batch_of(random_batch)
    total, count, grads = gradients(module, batch)
    assert module._chunks is True
    module._chunks = False
    expected, expected_count, expected_grads = gradients(module, batch)
    assert count == expected_count > 0
    torch.testing.assert_close(total, expected, rtol=1e-6, atol=0)
    for ours, theirs in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_logits_that_are_more_than_the_output_layer_are_found_out(tiny_llama, random_batch) -> None:
    model = tiny_llama()
    plain = type(model).forward

    def capped(self, *args, **kwargs):
        output = plain(self, *args, **kwargs)
        output.logits = 2 * torch.tanh(output.logits / 2)
        return output

    model.forward = capped.__get__(model)
    module, batch = module_of(model), batch_of(random_batch)
    total, _ = module.target_loss(batch)
    assert module._chunks is False
    torch.testing.assert_close(total, token_loss(*module._answers(batch))[0])


def test_an_output_layer_that_is_adapted_or_watched_is_left_to_the_model(tiny_llama) -> None:
    model = tiny_llama()
    assert plain_head(model) is model.lm_head
    model.lm_head.register_forward_hook(lambda *args: None)
    assert plain_head(model) is None
    model = tiny_llama()
    LoRA(r=2, target_modules=["lm_head"]).attach(model)
    assert plain_head(model) is None
