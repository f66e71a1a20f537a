"""Optimizer state in torch's form; under engines see test_fsdp.py and test_zero.py."""

from __future__ import annotations

import torch
from torch import nn

from lightning_peft import distributed


def stepped(seed: int) -> tuple[nn.Linear, torch.optim.AdamW]:
    """A model after one step, its weight and its bias in groups of their own."""
    torch.manual_seed(seed)
    model = nn.Linear(3, 2)
    groups = [{"params": [model.weight]}, {"params": [model.bias], "lr": 0.5}]
    optimizer = torch.optim.AdamW(groups, lr=0.1)
    model(torch.randn(4, 3)).square().mean().backward()
    optimizer.step()
    return model, optimizer


def test_on_one_device_the_state_is_torchs_own() -> None:
    model, optimizer = stepped(0)
    state, expected = distributed.optimizer_state(optimizer), optimizer.state_dict()
    assert state["param_groups"] == expected["param_groups"]
    torch.testing.assert_close(state["state"], expected["state"], rtol=0, atol=0)
    state["state"][0]["exp_avg"] = None  # entries are changed later on
    assert optimizer.state[model.weight]["exp_avg"] is not None


def test_what_was_given_is_taken_back() -> None:
    _, first = stepped(0)
    model, second = stepped(1)
    state = distributed.optimizer_state(first)
    state["param_groups"][1]["lr"] = 0.25
    distributed.load_optimizer_state(second, state)
    torch.testing.assert_close(
        second.state[model.weight]["exp_avg"], state["state"][0]["exp_avg"], rtol=0, atol=0
    )
    assert [group["lr"] for group in second.param_groups] == [0.1, 0.25]


def test_parameters_come_in_the_order_of_the_states_indices() -> None:
    model, optimizer = stepped(0)
    found = distributed.parameters_of(optimizer)
    assert [p is q for p, q in zip(found, [model.weight, model.bias], strict=True)] == [True, True]
