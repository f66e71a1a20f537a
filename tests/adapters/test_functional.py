"""The layer's own forward and backward against autograd of its formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_peft.adapters import LoRALinear
from lightning_peft.adapters.dropout import share_draws
from lightning_peft.adapters.gates import RankScale
from lightning_peft.strategies import RankDropout, StepMask

GATES = {
    "no gate": lambda: None,
    "scale": lambda: RankScale(6, 0.7),
    "token": lambda: RankDropout(6, 0.5, "token"),
    "batch": lambda: RankDropout(6, 0.5, "batch"),
    "step": lambda: StepMask(6, 0.5),
}
# Fewer rows than the matrix has inputs or outputs, and more than both: other products are cheaper.
ROWS = [3, 40]
DTYPES = [(torch.float32, 1e-5), (torch.bfloat16, 0.03), (torch.float64, 1e-12)]


def layer_of(gate: str, p: float, dtype: torch.dtype, **base: Any) -> LoRALinear:
    torch.manual_seed(0)
    layer = LoRALinear(
        nn.Linear(20, 12, dtype=dtype, **base).requires_grad_(False), 6, 9, p, gate=GATES[gate]()
    )
    layer.reset_parameters(False)
    return layer.train()


def formula_of(layer: LoRALinear) -> Any:
    """The formula, left to autograd, with dropout as PyTorch's own in the adapter's precision."""
    return lambda x: layer._formula(x, layer.dropout(x.to(layer.lora_A.dtype)))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("gate", GATES)
def test_forward_and_gradients_are_those_of_the_formula(
    gate, p, dtype, tolerance, rows, run_layer, assert_same
) -> None:
    layer = layer_of(gate, p, dtype)
    x = torch.randn(2, rows, 20, dtype=dtype)
    assert_same(run_layer(layer, layer, x), run_layer(layer, formula_of(layer), x), tolerance)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("gate", ["no gate", "token"])
def test_a_base_that_trains_or_is_watched_gets_its_gradients_and_calls(
    gate, p, run_layer, assert_same
) -> None:
    layer = layer_of(gate, p, torch.float32)
    calls: list[int] = []
    layer.base.register_forward_hook(lambda *args: calls.append(1))
    x = torch.randn(2, 40, 20)
    assert_same(run_layer(layer, layer, x), run_layer(layer, formula_of(layer), x), 1e-5)
    assert len(calls) == 2
    layer = layer_of(gate, p, torch.float32)
    layer.base.requires_grad_(True)
    ours = run_layer(layer, layer, x)
    assert_same(ours, run_layer(layer, formula_of(layer), x), 1e-5)
    assert len(ours) == 6  # with the base's weight and bias


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("shared", [False, True])
def test_recomputation_draws_the_same_masks(gate, p, shared, run_layer) -> None:
    layer = layer_of(gate, p, torch.float32)
    if shared:
        share_draws(layer.modules())
    x = torch.randn(2, 40, 20)
    recomputed = run_layer(layer, lambda x: checkpoint(layer, x, use_reentrant=False), x)
    assert all(map(torch.equal, recomputed, run_layer(layer, layer, x)))


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_autocast_computes_what_its_own_products_would(gate, p, run_layer, assert_same) -> None:
    layer = layer_of(gate, p, torch.float32)

    def under_autocast(forward: Any) -> Any:
        def run_it(x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return forward(x)

        return run_it

    x = torch.randn(2, 40, 20)
    ours, formula = (run_layer(layer, under_autocast(f), x) for f in (layer, formula_of(layer)))
    assert ours[0].dtype == torch.bfloat16
    assert_same(ours, formula, 0.03)


@pytest.mark.parametrize("rows", ROWS)
def test_an_input_without_gradient_costs_none_and_changes_none(rows, run_layer) -> None:
    layer = layer_of("no gate", 0.0, torch.float32)
    x = torch.randn(2, rows, 20)
    with_grad = run_layer(layer, layer, x)
    layer.zero_grad()
    y = layer(x)
    (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
    assert torch.equal(layer.lora_A.grad, with_grad[2])
    assert torch.equal(layer.lora_B.grad, with_grad[3])


def saved(layer: nn.Module, x: Tensor) -> set[int]:
    """Bytes of each tensor that the graph of a forward holds, but for x and the parameters."""
    held: dict[int, int] = {}
    known = {t.data_ptr() for t in (x, *layer.parameters())}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in known:
            held[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(x)
    return set(held.values())


def test_of_a_dropped_input_one_byte_for_each_element_is_kept() -> None:
    x = torch.randn(2, 40, 20, requires_grad=True)
    ranks = 2 * 40 * 6 * 4
    assert saved(layer_of("no gate", 0.3, torch.float32), x) <= {x.numel(), ranks}
    assert saved(layer_of("no gate", 0.0, torch.float32), x) <= {ranks}
    half = x.detach().bfloat16().requires_grad_()
    assert saved(layer_of("no gate", 0.0, torch.bfloat16), half) <= {ranks}


@pytest.mark.parametrize("gate", ["no gate", "token"])
def test_under_a_frozen_A_nothing_of_the_input_is_kept(gate: str) -> None:
    layer = layer_of(gate, 0.0, torch.float32)
    layer.lora_A.requires_grad_(False)
    inside = torch.randn(2, 40, 20, requires_grad=True)
    x = inside * 1.0  # an activation, which would be kept as one
    assert x.numel() * 4 not in saved_of_all(layer, x)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("gate", ["no gate", "token"])
def test_a_frozen_A_changes_no_other_gradient(gate: str, p: float) -> None:
    found = []
    for frozen in (False, True):
        layer = layer_of(gate, p, torch.float32)
        layer.lora_A.requires_grad_(not frozen)
        x = torch.linspace(-1, 1, 1600).view(2, 40, 20).requires_grad_()
        torch.manual_seed(3)
        layer(x).square().sum().backward()
        found.append((x.grad, layer.lora_B.grad))
    for whole, without in zip(*found, strict=True):
        assert torch.equal(whole, without)


def saved_of_all(layer: LoRALinear, x: Tensor) -> set[int]:
    """Bytes of everything that a forward pass keeps, its input too."""
    held: set[int] = set()

    def pack(tensor: Tensor) -> Tensor:
        held.add(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(x)
    return held
