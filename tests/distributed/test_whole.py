"""The keeper of parameters that no engine has changed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from lightning_peft.distributed.whole import Whole
from lightning_peft.errors import UserError


@pytest.fixture
def trained() -> tuple[nn.Parameter, torch.optim.AdamW]:
    """A parameter (2, 3) after one step, by a gradient of 0 … 5."""
    parameter = nn.Parameter(torch.ones(2, 3))
    optimizer = torch.optim.AdamW([parameter], lr=1e-2)
    parameter.grad = torch.arange(6.0).view(2, 3)
    optimizer.step()
    return parameter, optimizer


def test_value_gradient_and_moments_are_the_tensors_themselves(trained: Any) -> None:
    parameter, optimizer = trained
    keeper = Whole(parameter)
    assert keeper.value().data_ptr() == parameter.data_ptr()
    assert not keeper.value().requires_grad
    assert keeper.gradient() is parameter.grad
    moments = keeper.moments(optimizer)
    assert [*moments] == ["exp_avg", "exp_avg_sq"]
    assert moments["exp_avg"] is optimizer.state[parameter]["exp_avg"]
    torch.testing.assert_close(moments["exp_avg"], 0.1 * torch.arange(6.0).view(2, 3))
    assert keeper.counters(optimizer) == {"step": torch.tensor(1.0)}


def test_what_is_written_stands_in_the_same_tensors(trained: Any) -> None:
    parameter, optimizer = trained
    keeper, grad = Whole(parameter), parameter.grad
    moment = optimizer.state[parameter]["exp_avg"]
    with torch.no_grad():
        keeper.write(torch.full((2, 3), 5.0))
        keeper.write_gradient(torch.full((2, 3), 6.0))
        keeper.write_moment(optimizer, "exp_avg", torch.full((2, 3), 7.0))
    assert (parameter == 5).all()
    assert parameter.grad is grad
    assert (grad == 6).all()
    assert optimizer.state[parameter]["exp_avg"] is moment
    assert (moment == 7).all()


def test_a_graph_that_is_alive_does_not_notice_a_write() -> None:
    parameter = nn.Parameter(torch.tensor([2.0]))
    loss = parameter.square().sum()
    with torch.no_grad():
        Whole(parameter).write(torch.tensor([3.0]))
    loss.backward()
    assert parameter.grad == torch.tensor([6.0])


def test_before_the_first_step_nothing_is_remembered_and_nothing_is_made() -> None:
    parameter = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([parameter])
    assert Whole(parameter).moments(optimizer) == {}
    assert Whole(parameter).counters(optimizer) == {}
    assert Whole(parameter).gradient() is None
    assert not optimizer.state


def test_moments_of_another_shape_cannot_be_taken_out() -> None:
    parameter = nn.Parameter(torch.ones(4, 3))
    optimizer: Any = SimpleNamespace(state={parameter: {"row": torch.ones(4), "step": 1}})
    with pytest.raises(UserError, match="SimpleNamespace keeps row in another shape than the par"):
        Whole(parameter).moments(optimizer)
