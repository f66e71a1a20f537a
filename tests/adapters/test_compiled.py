"""A compiled model and its ranks."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo as dynamo
from torch import nn
from torch._dynamo.testing import CompileCounter

from lightning_peft.adapters import LoRALinear, adapter_layers, keep_components
from lightning_peft.adapters.compiled import compile_model
from lightning_peft.strategies import DoRA, LoRA


@pytest.fixture(autouse=True)
def dynamo_as_it_was():
    with dynamo.config.patch({}):
        yield
    dynamo.reset()


@pytest.mark.parametrize("strategy", [LoRA, DoRA])
def test_ranks_fall_with_few_compilations_and_the_numbers_of_the_layer(strategy) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(12, 12) for _ in range(3)))
    strategy(r=16).attach(model)
    for layer in adapter_layers(model).values():
        nn.init.normal_(layer.lora_B, std=0.1)
    counter = CompileCounter()
    compiled = compile_model(model, backend=counter)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.01)
    x = torch.randn(5, 12)
    for rank in (16, 15, 13, 11, 9, 7, 6, 5, 4, 3, 2):
        for layer in adapter_layers(model).values():
            keep_components(layer, torch.arange(rank), optimizer)
        loss = compiled(x).square().sum()  # alive while ranks change, as in most loops
        loss.backward()
        grads = [p.grad.clone() for p in parameters]
        model.zero_grad()
        expected = model(x).square().sum()
        expected.backward()
        torch.testing.assert_close(loss, expected)
        for ours, theirs in zip(grads, (p.grad for p in parameters), strict=True):
            torch.testing.assert_close(ours, theirs)
        optimizer.step()
        model.zero_grad()
    assert counter.frame_count <= 3


def test_a_graph_over_the_old_rank_does_not_go_through_in_silence() -> None:
    layer = LoRALinear(nn.Linear(6, 6), 4, 4)
    compiled = compile_model(layer, backend="eager")
    loss = compiled(torch.randn(2, 6)).sum()

    def shrink_then_go_back() -> None:
        keep_components(layer, torch.arange(2))
        loss.backward()

    with pytest.raises(RuntimeError):
        shrink_then_go_back()
