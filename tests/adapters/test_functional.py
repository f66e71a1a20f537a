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
from lightning_peft.adapters.scaled import ScaledLinear
from lightning_peft.strategies import RankDropout, StepMask
from lightning_peft.strategies.dora import DoRALinear

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


def run(layer: nn.Module, forward: Any, x: Tensor) -> list[Tensor]:
    """Output, gradient of the input and of every parameter, from one draw of all masks."""
    x = x.detach().clone().requires_grad_()
    layer.zero_grad()
    torch.manual_seed(3)
    y = forward(x)
    (y.float() * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
    return [y.detach(), x.grad, *(p.grad.clone() for p in layer.parameters() if p.requires_grad)]


def same(ours: list[Tensor], theirs: list[Tensor], tolerance: float) -> None:
    assert len(ours) == len(theirs) > 3
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        assert b.abs().max() > 0
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * float(b.abs().max()))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("gate", GATES)
def test_forward_and_gradients_are_those_of_the_formula(gate, p, dtype, tolerance, rows) -> None:
    layer = layer_of(gate, p, dtype)
    x = torch.randn(2, rows, 20, dtype=dtype)
    same(run(layer, layer, x), run(layer, formula_of(layer), x), tolerance)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("gate", ["no gate", "token"])
def test_a_base_that_trains_or_is_watched_gets_its_gradients_and_calls(gate, p) -> None:
    layer = layer_of(gate, p, torch.float32)
    calls: list[int] = []
    layer.base.register_forward_hook(lambda *args: calls.append(1))
    x = torch.randn(2, 40, 20)
    same(run(layer, layer, x), run(layer, formula_of(layer), x), 1e-5)
    assert len(calls) == 2
    layer = layer_of(gate, p, torch.float32)
    layer.base.requires_grad_(True)
    ours = run(layer, layer, x)
    same(ours, run(layer, formula_of(layer), x), 1e-5)
    assert len(ours) == 6  # with the base's weight and bias


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("shared", [False, True])
def test_recomputation_draws_the_same_masks(gate, p, shared) -> None:
    layer = layer_of(gate, p, torch.float32)
    if shared:
        share_draws(layer.modules())
    x = torch.randn(2, 40, 20)
    recomputed = run(layer, lambda x: checkpoint(layer, x, use_reentrant=False), x)
    assert all(map(torch.equal, recomputed, run(layer, layer, x)))


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_autocast_computes_what_its_own_products_would(gate, p) -> None:
    layer = layer_of(gate, p, torch.float32)

    def under_autocast(forward: Any) -> Any:
        def run_it(x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return forward(x)

        return run_it

    x = torch.randn(2, 40, 20)
    ours, formula = (run(layer, under_autocast(f), x) for f in (layer, formula_of(layer)))
    assert ours[0].dtype == torch.bfloat16
    same(ours, formula, 0.03)


@pytest.mark.parametrize("rows", ROWS)
def test_an_input_without_gradient_costs_none_and_changes_none(rows) -> None:
    layer = layer_of("no gate", 0.0, torch.float32)
    x = torch.randn(2, rows, 20)
    with_grad = run(layer, layer, x)
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


def test_layers_that_share_an_input_may_share_its_draw() -> None:
    layers = nn.ModuleList(layer_of("no gate", 0.5, torch.float32) for _ in range(3))
    x, other = torch.ones(4, 20), torch.ones(4, 20)

    def masks(x: Tensor) -> list[Tensor]:
        return [layer.dropout.kept(x).mask for layer in layers]

    first, second, _ = masks(x)
    assert not torch.equal(first, second)
    share_draws(layers.modules())
    first, second, third = masks(x)
    assert torch.equal(first, second)
    assert torch.equal(first, third)
    assert not torch.equal(first, masks(other)[0])
    x.add_(1)  # no longer the tensor that it was
    again, shared, _ = masks(x)
    assert not torch.equal(first, again)
    assert torch.equal(again, shared)


def test_a_layer_given_the_same_tensor_again_draws_anew() -> None:
    layers = nn.ModuleList(layer_of("no gate", 0.5, torch.float32) for _ in range(2))
    share_draws(layers.modules())
    x = torch.ones(4, 20)
    first, shared = (layer.dropout.kept(x).mask for layer in layers)
    again, shared_again = (layer.dropout.kept(x).mask for layer in layers)
    assert torch.equal(first, shared)
    assert torch.equal(again, shared_again)
    assert not torch.equal(first, again)


def test_a_shared_draw_gives_each_layer_its_own_gradients() -> None:
    torch.manual_seed(0)
    layers = nn.ModuleList(layer_of("no gate", 0.5, torch.float32) for _ in range(2))
    for layer in layers:
        nn.init.normal_(layer.lora_B)
    share_draws(layers.modules())
    x = torch.randn(3, 20)
    ours = run(layers, lambda x: sum(layer(x) for layer in layers), x)
    torch.manual_seed(3)
    keep = layers[0].dropout.kept(x.clone()).mask

    def formula(x: Tensor) -> Tensor:
        dropped = x * keep * 2
        changes = (dropped @ layer.lora_A.T @ layer.lora_B.T for layer in layers)
        return sum(layer.base(x) + 1.5 * c for layer, c in zip(layers, changes, strict=True))

    same(ours, run(layers, formula, x), 1e-5)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("bias", [False, True])
def test_dora_is_its_formula(bias, p, dtype, tolerance, rows) -> None:
    torch.manual_seed(0)
    base = nn.Linear(20, 12, bias=bias, dtype=dtype).requires_grad_(False)
    layer = DoRALinear(base, 6, 9, p)
    layer.reset_parameters(False)
    nn.init.uniform_(layer.lora_magnitude, 0.5, 1.5)
    layer.train()

    def formula(x: Tensor) -> Tensor:
        """Equation 5 with the norm detached, and the change from the dropped input."""
        dropped = layer.dropout(x)
        weight = base.weight.to(layer.lora_A.dtype)
        adapted = weight + layer.scaling * layer.lora_B @ layer.lora_A
        directed = (layer.lora_magnitude / adapted.norm(dim=1).detach())[:, None] * adapted
        inside = x.to(weight.dtype), dropped.to(weight.dtype)
        y = inside[0] @ weight.T + inside[1] @ (directed - weight).T
        return (y + base.bias if bias else y).to(dtype)

    x = torch.randn(2, rows, 20, dtype=dtype)
    same(run(layer, layer, x), run(layer, formula, x), tolerance)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_trained_scales_are_their_formula(p, dtype, tolerance) -> None:
    torch.manual_seed(0)
    base = nn.Linear(20, 12, dtype=dtype).requires_grad_(False)
    layer = ScaledLinear(base, 6, 9, p, gate=RankScale(6, 0.7), start=0.3)
    layer.reset_parameters(False)
    layer.train()

    def formula(x: Tensor) -> Tensor:
        z = layer.gate(layer.dropout(x.to(layer.lora_A.dtype)) @ layer.lora_A.T)
        change = z @ layer.lora_B.T * layer.output_scale * layer.scaling
        return base(x) + change.to(dtype)

    x = torch.randn(2, 40, 20, dtype=dtype)
    same(run(layer, layer, x), run(layer, formula, x), tolerance)
