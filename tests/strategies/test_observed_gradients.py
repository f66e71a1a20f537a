"""Gradients of frozen weights from inputs and output gradients, against autograd's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_peft.adapters import adapter_layers
from lightning_peft.errors import UserError
from lightning_peft.strategies import LoRA
from lightning_peft.strategies.observed_gradients import each_gradient, mean_gradients


def received(model: Any, batches: list[Any], loss: Any) -> list[dict[str, Tensor]]:
    """What is received, by batch."""
    found: list[dict[str, Tensor]] = [{}]

    def receive(name: str, gradient: Tensor) -> None:
        if name in found[-1]:
            found.append({})
        found[-1][name] = gradient

    assert each_gradient(model, batches, loss, receive) == len(batches)
    return found


def own_gradients(model: Any, names: Any, loss: Any) -> list[Tensor]:
    weights = [model.get_submodule(name).weight for name in names]
    return list(torch.autograd.grad(loss(model), weights))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_they_are_the_weights_own_for_each_batch(
    checkpointing, dtype, tiny_llama, random_batch
) -> None:
    plain, model = tiny_llama().to(dtype), tiny_llama().to(dtype)
    LoRA(r=2, lora_dropout=0.5).attach(model)
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    batches = [random_batch(0), random_batch(1, rows=3)]
    found = received(model, batches, lambda batch: model(**batch).loss)
    assert len(found) == 2
    for batch, gradients in zip(batches, found, strict=True):
        expected = own_gradients(plain, gradients, lambda m, batch=batch: m(**batch).loss)
        assert len(expected) == 14
        for gradient, value in zip(gradients.values(), expected, strict=True):
            assert gradient.dtype == dtype
            tolerance = 1e-5 if dtype == torch.float32 else 1e-10
            assert (gradient - value).norm() <= tolerance * value.norm()


class Twice(nn.Module):
    """One linear twice, another whose second output the loss does not depend on."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 3)
        self.idle = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.first(self.first(x).tanh()))
        self.second(x)
        return y


def test_a_layer_that_is_used_twice_has_one_gradient() -> None:
    plain, model, x = Twice(), Twice(), torch.randn(5, 4)
    LoRA(r=2).attach(model)
    (found,) = received(model, [x], lambda x: model(x).square().sum())
    assert found.keys() == {"first", "second"}
    expected = own_gradients(plain, found, lambda m: m(x).square().sum())
    for gradient, value in zip(found.values(), expected, strict=True):
        torch.testing.assert_close(gradient, value, rtol=1e-5, atol=1e-5)


def test_nothing_is_left_behind(tiny_llama, random_batch) -> None:
    model = tiny_llama()
    LoRA(r=2).attach(model)
    received(model, [random_batch(0)], lambda batch: model(**batch).loss)
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    # As where a process has no batch left, which has a loss to be called all the same.
    assert each_gradient(model, [None], lambda batch: torch.zeros(()), pytest.fail) == 1


def test_the_mean_is_that_of_the_bases_own(tiny_llama, random_batch) -> None:
    model, plain = tiny_llama().eval(), tiny_llama()
    LoRA(r=4).attach(model)
    batches = [random_batch(i) for i in range(3)]
    found = mean_gradients(model, batches, lambda b: model(**b).loss)
    assert not model.training
    for batch in batches:
        plain(**batch).loss.backward()
    assert list(found) == list(adapter_layers(model))
    for name, gradient in found.items():
        expected = plain.get_submodule(name).weight.grad / 3
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


def test_half_precision_gradients_are_added_in_float32(tiny_llama, random_batch) -> None:
    model = tiny_llama().to(torch.bfloat16)
    LoRA(r=4, target_modules=["q_proj"]).attach(model)
    one, other, both = (
        mean_gradients(model, [random_batch(i) for i in seeds], lambda b: model(**b).loss)
        for seeds in ([0], [1], [0, 1])
    )
    for name, gradient in both.items():
        assert gradient.dtype == torch.float32
        torch.testing.assert_close(gradient, (one[name] + other[name]) / 2, rtol=0, atol=1e-9)


def test_an_empty_sample_is_refused(tiny_llama) -> None:
    LoRA(r=4).attach(model := tiny_llama())
    with pytest.raises(UserError, match=r"^the sample is empty, so that no gradient can be taken"):
        mean_gradients(model, [], lambda b: model(**b).loss)


def test_a_loss_that_passes_the_model_by_is_refused(tiny_llama, random_batch) -> None:
    LoRA(r=4).attach(model := tiny_llama())
    passes_by = lambda batch: model.lm_head(model.model(batch["input_ids"])[0]).square().mean()  # noqa: E731
    with pytest.raises(UserError, match=r"^no forward pass of the adapted model was seen on the"):
        mean_gradients(model, [random_batch(0)], passes_by)
