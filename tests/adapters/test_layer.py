"""The adapted layer against its formula, written out."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from lightning_peft.adapters import LoRALinear, keep_components


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("use_rslora", "scaling"), [(False, 2.0), (True, 6 / math.sqrt(3))])
@pytest.mark.parametrize("shape", [(7,), (5, 7), (2, 5, 7)])
def test_forward_is_the_formula(bias, use_rslora, scaling, shape, filled) -> None:
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


def test_dropout_acts_on_the_input_of_a_alone(filled) -> None:
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


def test_adapters_are_float32_over_a_bfloat16_base(filled) -> None:
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


def test_a_layer_of_rank_zero_is_its_base_and_can_still_be_trained(filled) -> None:
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


@pytest.mark.parametrize("r", [1, 3, 7])
def test_the_squared_norm_is_the_naive_one(r, filled, diagonal) -> None:
    layer = filled(nn.Linear(7, 40), r, gate=diagonal(torch.linspace(-1, 2, r)))
    x = torch.randn(3, 11, 7)
    naive = (x @ layer.delta_weight().T).square().sum(-1)
    torch.testing.assert_close(layer.delta_sq_norm(x), naive, rtol=1e-5, atol=1e-8)


def test_a_subclass_is_used_as_it_is(filled) -> None:
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


@pytest.mark.parametrize("resize", [True, False])
def test_the_living_part_is_read_and_changed_as_a_whole(resize, filled) -> None:
    layer = filled(nn.Linear(7, 4).requires_grad_(False), r=5)
    grads = layer.whole_gradients()
    assert [g.shape for g in grads] == [(5, 7), (4, 5)]
    assert not grads[0].any()  # no backward pass yet
    assert not grads[1].any()
    layer(torch.randn(3, 7)).sum().backward()
    expected = layer.lora_A.grad[[1, 3]].clone(), layer.lora_B.grad[:, [1, 3]].clone()
    keep_components(layer, torch.tensor([1, 3]), resize=resize)
    assert all(map(torch.equal, layer.whole_gradients(), expected))
    A, B = (part.detach().clone() for part in layer.whole())
    assert (A.shape, B.shape) == ((2, 7), (4, 2))
    layer.add_to_whole(torch.ones(2, 7), 2 * torch.ones(4, 2))
    assert torch.equal(layer.active_A, A + 1)
    assert torch.equal(layer.active_B, B + 2)
    assert not layer.lora_A[2:].any()  # what stands behind stays nothing
    assert not layer.lora_B[:, 2:].any()


def test_layers_that_share_train_one_pair(filled) -> None:
    one, other = (filled(nn.Linear(7, 4)) for _ in range(2))
    other.share_with(one)
    assert other.lora_A is one.lora_A
    assert other.lora_B is one.lora_B
    assert other.sharing_key == one.sharing_key


def test_pefts_form_holds_the_scaling_apart(filled) -> None:
    layer = filled(nn.Linear(7, 4))
    form = layer.peft()
    assert list(form.tensors) == ["lora_A.weight", "lora_B.weight"]
    torch.testing.assert_close(form.tensors["lora_B.weight"], layer.lora_B.detach())
    assert (form.config, form.scaling) == ({}, 2.0)
