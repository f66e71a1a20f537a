"""Rows and columns leave with all that stands beside them: the rest stays what it was."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Adafactor

from lightning_peft.adapters import AdaptedLayer, LoRALinear
from lightning_peft.adapters.features import base_of, keep_features
from lightning_peft.errors import UserError
from lightning_peft.strategies import RankDropout

KEEP = torch.tensor([0, 2, 3])


@pytest.fixture
def layer(filled) -> LoRALinear:
    torch.manual_seed(0)
    made = filled(nn.Linear(7, 6), gate=RankDropout(3, 0.3)).train()
    made.base.requires_grad_(False)
    return made


def step(layer: nn.Module, optimizer: Any, x: Tensor, rows: Tensor | None = None) -> None:
    y = layer(x)
    y = y if rows is None else y[:, rows]
    y.cos().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("bias", [True, False])
def test_what_is_left_computes_and_trains_as_in_the_whole_layer(layer, dim, bias) -> None:
    if not bias:
        layer.base.bias = None
    optimizer = torch.optim.AdamW(layer.own_parameters(), lr=0.05)
    x = torch.randn(20, 7)
    mask = torch.zeros(7).index_fill(0, KEEP, 1)
    torch.manual_seed(1)
    step(layer, optimizer, x)
    whole, its_optimizer = copy.deepcopy((layer, optimizer))
    own = list(map(id, layer.parameters()))
    keep_features(layer, dim, KEEP, optimizer)
    assert list(map(id, layer.parameters())) == own
    assert (layer.out_features, layer.in_features) == ((3, 7), (6, 3))[dim]
    assert (layer.base.out_features, layer.base.in_features) == ((3, 7), (6, 3))[dim]
    assert layer.resized
    assert not whole.resized
    torch.manual_seed(2)
    for _ in range(4):
        step(layer, optimizer, x if dim == 0 else x[:, KEEP])
    torch.manual_seed(2)
    for _ in range(4):
        step(whole, its_optimizer, x if dim == 0 else x * mask, KEEP if dim == 0 else None)
    expected = whole.eval()(x)[:, KEEP] if dim == 0 else whole.eval()(x * mask)
    found = layer.eval()(x if dim == 0 else x[:, KEEP])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_gradients_and_moments_follow(layer) -> None:
    optimizer = torch.optim.AdamW(layer.own_parameters(), lr=0.05)
    step(layer, optimizer, torch.randn(20, 7))
    layer(torch.randn(20, 7)).sum().backward()
    A, B = layer.lora_A, layer.lora_B
    grads = A.grad.clone(), B.grad.clone()
    moments = {key: optimizer.state[B][key].clone() for key in ("exp_avg", "exp_avg_sq")}
    of_A = optimizer.state[A]["exp_avg"]
    keep_features(layer, 0, KEEP, optimizer)
    assert torch.equal(B.grad, grads[1][KEEP])
    assert all(torch.equal(optimizer.state[B][key], value[KEEP]) for key, value in moments.items())
    assert torch.equal(A.grad, grads[0])
    assert optimizer.state[A]["exp_avg"] is of_A
    assert not layer.base.weight.requires_grad


def test_a_plain_linear_loses_them_too() -> None:
    linear = nn.Linear(7, 6)
    weight, bias = linear.weight.detach().clone(), linear.bias.detach().clone()
    keep_features(linear, 0, KEEP)
    keep_features(linear, 1, KEEP)
    assert torch.equal(linear.weight, weight[KEEP][:, KEEP])
    assert torch.equal(linear.bias, bias[KEEP])
    assert (linear.out_features, linear.in_features) == (3, 3)
    assert base_of(linear) is linear


class Own(AdaptedLayer):
    """A form that does not say what lies along rows and columns."""


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (
            lambda: (Own(nn.Linear(7, 6)), None),
            "Own does not say what it holds for each row and column, so that none can leave.",
        ),
        (
            lambda: (quantized(), None),
            "rows and columns cannot leave a Linear.",
        ),
    ],
)
def test_what_cannot_lose_any_is_refused_and_stays(wrong, sentence) -> None:
    made, optimizer = wrong()
    shapes = [p.shape for p in made.parameters()]
    with pytest.raises(UserError) as error:
        keep_features(made, 0, KEEP, optimizer)
    assert str(error.value) == sentence
    assert [p.shape for p in made.parameters()] == shapes


def quantized() -> nn.Linear:
    linear = nn.Linear(7, 6).requires_grad_(False)
    linear.weight = nn.Parameter(torch.zeros(21, 1, dtype=torch.uint8), requires_grad=False)
    return linear


def test_an_optimizer_that_packs_its_state_is_refused_before_anything_changes(layer) -> None:
    optimizer = Adafactor(layer.own_parameters(), lr=0.05)
    step(layer, optimizer, torch.randn(20, 7))
    with pytest.raises(UserError, match="give an optimizer with plain moments"):
        keep_features(layer, 0, KEEP, optimizer)
    assert layer.base.weight.shape == (6, 7)


def test_an_engine_that_keeps_sizes_is_refused(layer, monkeypatch) -> None:
    monkeypatch.setattr("lightning_peft.distributed.resizable", lambda p: False)
    with pytest.raises(UserError, match=r"^rows and columns of a weight can leave on one device"):
        keep_features(layer, 0, KEEP)
