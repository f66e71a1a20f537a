"""Parameters, gradients and moments in full; under engines see test_fsdp.py and test_zero.py."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_peft import distributed
from lightning_peft.distributed import parameters
from lightning_peft.distributed.whole import Whole


@pytest.fixture
def model() -> nn.Linear:
    """A weight of ones (2, 3) and a bias of zeros, with gradients of 3 and 4."""
    model = nn.Linear(3, 2)
    nn.init.ones_(model.weight)
    nn.init.zeros_(model.bias)
    model.weight.grad = torch.full((2, 3), 3.0)
    model.bias.grad = torch.full((2,), 4.0)
    return model


def test_one_device_keeps_parameters_whole(model: nn.Linear) -> None:
    assert type(parameters.keeper_of(model.weight)) is Whole
    assert distributed.shape(model.weight) == (2, 3)
    assert not distributed.is_cut(model.weight)
    assert torch.equal(distributed.value(model.weight), torch.ones(2, 3))
    assert not distributed.value(model.weight).requires_grad
    with distributed.gathered(model, [*model.parameters()]):
        assert torch.equal(model.weight, torch.ones(2, 3))


@pytest.mark.parametrize("several", [False, True])
def test_a_parameter_may_change_its_size_on_one_device_only(
    several: bool, model: nn.Linear, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parameters, "is_distributed", lambda: several)
    assert distributed.resizable(model.weight) is not several


def test_the_norm_is_of_all_gradients_of_what_trains(model: nn.Linear) -> None:
    norm = distributed.gradient_norm(model.parameters())
    torch.testing.assert_close(norm, torch.tensor((6 * 9.0 + 2 * 16.0) ** 0.5))
    model.weight.requires_grad_(False)
    torch.testing.assert_close(
        distributed.gradient_norm(model.parameters()), torch.tensor(32.0**0.5)
    )
    model.bias.grad = None
    assert distributed.gradient_norm(model.parameters()) == 0
    assert distributed.gradient(model.bias) is None


def test_a_change_is_made_in_value_gradient_and_moments_alike(model: nn.Linear) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    optimizer.step()
    distributed.rewrite(model.weight, lambda t: t * 10, optimizer)
    assert (model.weight == 10).all()
    assert (distributed.gradient(model.weight) == 30).all()
    moments = distributed.moments(model.weight, optimizer)
    torch.testing.assert_close(moments["exp_avg"], torch.full((2, 3), 3.0))
    torch.testing.assert_close(moments["exp_avg_sq"], torch.full((2, 3), 0.09))
    distributed.rewrite(model.weight, lambda t: t + 1)  # moments stay without their optimizer
    assert (model.weight == 11).all()
    torch.testing.assert_close(
        distributed.moments(model.weight, optimizer)["exp_avg"], torch.full((2, 3), 3.0)
    )


def test_a_parameter_is_set(model: nn.Linear) -> None:
    distributed.write(model.bias, torch.tensor([1.0, 2.0]))
    assert model.bias.tolist() == [1.0, 2.0]
