"""The adapted layer against its formula, written out."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_peft.adapters import LoRALinear, keep_components
from lightning_peft.strategies import StepMask


class Diagonal(nn.Module):
    """A fixed diagonal, with a value for each component."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.register_buffer("values", values)

    def keep(self, indices: Tensor) -> None:
        self.values = self.values[indices]

    def forward(self, z: Tensor) -> Tensor:
        return z * self.values.to(z.dtype)


def filled(base: nn.Module, r: int = 3, alpha: float = 6.0, **more: Any) -> LoRALinear:
    """A layer whose B is not zero."""
    layer = LoRALinear(base, r, alpha, **more)
    layer.reset_parameters(False)
    return layer


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("use_rslora", "scaling"), [(False, 2.0), (True, 6 / math.sqrt(3))])
@pytest.mark.parametrize("shape", [(7,), (5, 7), (2, 5, 7)])
def test_forward_is_the_formula(bias, use_rslora, scaling, shape) -> None:
    base = nn.Linear(7, 4, bias=bias, dtype=torch.float64)
    layer = filled(base, use_rslora=use_rslora)
    x = torch.randn(shape, dtype=torch.float64)
    change = scaling * layer.lora_B @ layer.lora_A
    expected = x @ (base.weight + change).T + (base.bias if bias else 0)
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer.delta_weight(), change.detach(), rtol=1e-12, atol=1e-12)
    assert layer.lora_A.dtype == torch.float64


def test_a_new_layer_equals_its_base_bit_for_bit() -> None:
    base = nn.Linear(7, 4)
    x = torch.randn(5, 7)
    assert torch.equal(LoRALinear(base, 3, 6, lora_dropout=0.5)(x), base(x))


def test_dropout_acts_on_the_input_of_a_alone() -> None:
    layer = filled(nn.Linear(50, 4), lora_dropout=0.5)
    x = torch.ones(20, 50)
    torch.manual_seed(0)
    y = layer(x)
    torch.manual_seed(0)
    kept = layer.dropout(x)
    assert sorted(kept.unique().tolist()) == [0, 2]
    torch.testing.assert_close(y, layer.base(x) + 2 * kept @ layer.lora_A.T @ layer.lora_B.T)
    layer.eval()
    torch.testing.assert_close(layer(x), layer.base(x) + 2 * x @ layer.lora_A.T @ layer.lora_B.T)


def test_adapters_are_float32_over_a_bfloat16_base() -> None:
    base = nn.Linear(7, 4, dtype=torch.bfloat16)
    layer = filled(base)
    x = torch.randn(5, 7, dtype=torch.bfloat16)
    change = 2 * x.float() @ layer.lora_A.T @ layer.lora_B.T
    y = layer(x)
    assert layer.lora_A.dtype == layer.lora_B.dtype == torch.float32
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), (base(x).float() + change), rtol=0.01, atol=0.02)
    y.float().sum().backward()
    assert layer.lora_A.grad.dtype == torch.float32
    assert LoRALinear(base, 3, 6, dtype=torch.bfloat16).lora_A.dtype == torch.bfloat16


def test_a_layer_of_rank_zero_is_its_base_and_can_still_be_trained() -> None:
    for resize in (True, False):
        layer = filled(nn.Linear(7, 4))
        keep_components(layer, torch.tensor([], dtype=torch.int64), resize=resize)
        x = torch.randn(5, 7)
        y = layer(x)
        assert layer.rank == 0
        assert torch.equal(y, layer.base(x))
        assert not layer.delta_weight().any()
        assert torch.equal(layer.delta_sq_norm(x), torch.zeros(5))
        y.sum().backward()
        assert layer.lora_A.grad is None or not layer.lora_A.grad.any()


def test_a_gate_folds_into_b() -> None:
    values = torch.tensor([0.5, -2.0, 0.0])
    layer = filled(nn.Linear(7, 4), gate=Diagonal(values)).eval()
    left, right = layer.factors()
    torch.testing.assert_close(left, 2 * layer.lora_B.detach() * values)
    assert torch.equal(right, layer.lora_A)
    x = torch.randn(5, 7)
    torch.testing.assert_close(layer(x), layer.base(x) + x @ (left @ right).T)
    keep_components(layer, torch.tensor([0, 2]))
    assert torch.equal(layer.factors()[0], left[:, [0, 2]])


def test_a_mask_is_read_as_the_identity_and_stays_in_its_mode() -> None:
    layer = filled(nn.Linear(7, 4), gate=StepMask(3, 0.5)).train()
    torch.testing.assert_close(layer.factors()[0], 2 * layer.lora_B.detach())
    assert layer.gate.training


@pytest.mark.parametrize("r", [1, 3, 7])
def test_the_squared_norm_is_the_naive_one(r) -> None:
    layer = filled(nn.Linear(7, 40), r, gate=Diagonal(torch.linspace(-1, 2, r)))
    x = torch.randn(3, 11, 7)
    naive = (x @ layer.delta_weight().T).square().sum(-1)
    torch.testing.assert_close(layer.delta_sq_norm(x), naive, rtol=1e-5, atol=1e-8)


def test_a_subclass_is_used_as_it_is() -> None:
    class Doubling(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    base = Doubling(7, 4)
    layer = filled(base)
    x = torch.randn(5, 7)
    torch.testing.assert_close(layer(x), base(x) + x @ layer.delta_weight().T)


def test_the_start_is_that_of_peft() -> None:
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(400, 300), 16, 16)
    assert layer.lora_A.abs().max() <= 1 / 20
    assert layer.lora_A.std().item() == pytest.approx(1 / 20 / math.sqrt(3), rel=0.02)
    layer.reset_parameters("gaussian")
    assert layer.lora_A.std().item() == pytest.approx(1 / 16, rel=0.02)
    assert not layer.lora_B.any()
    layer.reset_parameters(False)
    assert layer.lora_B.any()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"r": 0}, "r must be at least 1, got 0"),
        ({"r": 2, "lora_dropout": 1.0}, r"lora_dropout must lie in \[0, 1\), got 1.0"),
    ],
)
def test_wrong_numbers_are_refused(arguments, sentence) -> None:
    with pytest.raises(ValueError, match=sentence):
        LoRALinear(nn.Linear(3, 3), lora_alpha=1, **arguments)
    with pytest.raises(ValueError, match="init_lora_weights must be .* got 'ones'"):
        LoRALinear(nn.Linear(3, 3), 1, 1).reset_parameters("ones")
