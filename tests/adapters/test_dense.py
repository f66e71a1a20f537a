"""The weight of any linear as a matrix, without knowing its format."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft.adapters.dense import dense_weight, is_quantized, plain_linear, rounds_inputs


class Int8Linear(nn.Module):
    """A linear that holds its weight in 8 bits, in another layout than (d_out, d_in)."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach()
        self.scale = weight.abs().max() / 127
        self.weight = nn.Parameter((weight / self.scale).round().to(torch.int8).T, False)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.T.float() * self.scale, self.bias)


@pytest.mark.parametrize(
    ("dtype", "dense"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_a_plain_weight_is_itself_in_float32_at_least(dtype, dense) -> None:
    linear = nn.Linear(5, 3, dtype=dtype)
    weight = dense_weight(linear)
    assert weight.dtype == dense
    assert not weight.requires_grad
    assert torch.equal(weight, linear.weight.detach().to(dense))
    assert not is_quantized(linear)
    assert not rounds_inputs(linear)


@pytest.mark.parametrize("bias", [False, True])
def test_a_quantized_weight_is_read_through_the_layer(bias) -> None:
    torch.manual_seed(0)
    linear = Int8Linear(nn.Linear(5, 3, bias))
    assert is_quantized(linear)
    assert rounds_inputs(linear)
    expected = linear.weight.T.float() * linear.scale
    torch.testing.assert_close(dense_weight(linear), expected)
    plain = plain_linear(linear)
    assert type(plain) is nn.Linear
    assert not any(p.requires_grad for p in plain.parameters())
    x = torch.randn(4, 5)
    torch.testing.assert_close(plain(x), linear(x))


def test_a_plain_linear_takes_another_weight() -> None:
    linear, weight = nn.Linear(5, 3), torch.randn(3, 5)
    plain = plain_linear(linear, weight)
    assert torch.equal(plain.weight, weight)
    assert torch.equal(plain.bias, linear.bias)
    assert plain.bias is not linear.bias
