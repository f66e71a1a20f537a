"""Removal is real: values, gradients and moments of the survivors stay, the rest is gone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Adafactor

from lightning_peft import distributed
from lightning_peft.adapters import LoRALinear, keep_components
from lightning_peft.adapters.gates import RankScale
from lightning_peft.adapters.growth import match_ranks
from lightning_peft.adapters.shrink import check_gates
from lightning_peft.errors import UserError
from lightning_peft.strategies import LearnedRankMask, LoRA, PrunedLoRA, RankDropout, StepMask

KEEP = torch.tensor([1, 2, 4])


def make_layer(gate: nn.Module | None = None, r: int = 5) -> LoRALinear:
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(7, 6), r, 2.0, gate=gate)
    layer.reset_parameters(False)
    layer.base.requires_grad_(False)
    return layer


def adapters(layer: LoRALinear) -> list[nn.Parameter]:
    return [p for p in layer.parameters() if p.requires_grad]


def loss_of(layer: LoRALinear, seed: int) -> Tensor:
    x = torch.randn(20, 7, generator=torch.Generator().manual_seed(seed))
    return (layer(x) - x[:, :6].cos()).square().mean()


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.05, foreach=False),
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=0.05, foreach=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.05, fused=True),
    "amsgrad": lambda p: torch.optim.AdamW(p, lr=0.05, amsgrad=True),
    "sgd momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05),
}


@pytest.mark.parametrize("resize", [True, False])
def test_the_function_afterwards_is_the_masked_one(resize) -> None:
    layer, x = make_layer(), torch.randn(20, 7)
    mask = torch.zeros(5).index_fill(0, KEEP, 1)
    A, B = layer.lora_A.detach().clone(), layer.lora_B.detach().clone()
    expected = layer.base(x) + layer.scaling * (x @ A.T * mask) @ B.T
    keep_components(layer, KEEP, resize=resize)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(layer.active_A, A[KEEP])
    assert torch.equal(layer.active_B, B[:, KEEP])
    assert layer.rank == 3


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_parameters_gradients_and_moments_shrink_together(make) -> None:
    layer = make_layer()
    optimizer = make(adapters(layer))
    for seed in range(2):
        optimizer.zero_grad()
        loss_of(layer, seed).backward()
        optimizer.step()
    before = {
        p: (p.detach().clone(), p.grad.clone(), dict(optimizer.state[p]))
        for p in (layer.lora_A, layer.lora_B)
    }
    objects = [id(p) for p in optimizer.param_groups[0]["params"]]
    keep_components(layer, KEEP, optimizer)
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == objects
    for parameter, dim in layer.components():
        value, grad, state = before[parameter]
        assert torch.equal(parameter, value.index_select(dim, KEEP))
        assert torch.equal(parameter.grad, grad.index_select(dim, KEEP))
        matrices = 0
        for key, old in state.items():
            new = optimizer.state[parameter][key]
            if isinstance(old, Tensor) and old.shape == value.shape:
                matrices += 1
                assert torch.equal(new, old.index_select(dim, KEEP))
                assert new.untyped_storage().nbytes() == 4 * new.numel()
            else:
                assert new == old
        assert matrices >= 1
        assert parameter.untyped_storage().nbytes() == 4 * parameter.numel()
    optimizer.step()


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_dead_weight_behind_the_survivors_changes_no_loss(make) -> None:
    losses: dict[bool, list[float]] = {}
    for resize in (True, False):
        layer = make_layer()
        optimizer = make(adapters(layer))
        losses[resize] = []
        for step in range(10):
            optimizer.zero_grad()
            loss = loss_of(layer, step)
            loss.backward()
            losses[resize].append(loss.item())
            if step in (3, 6):
                keep = KEEP if step == 3 else torch.tensor([0, 2])
                keep_components(layer, keep, optimizer, resize=resize)
            optimizer.step()
        assert layer.lora_A.shape == ((2, 7) if resize else (5, 7))
        if not resize:
            assert not layer.lora_A[2:].any()
            assert not layer.lora_B[:, 2:].any()
    assert losses[True] == pytest.approx(losses[False], rel=1e-5)
    assert losses[True][-1] != losses[True][3]


def test_a_loss_of_before_may_stay_alive() -> None:
    layer = make_layer()
    optimizer = torch.optim.AdamW(adapters(layer), lr=0.05)
    kept = []
    for step in range(6):
        loss = loss_of(layer, step)
        loss.backward()
        kept.append(loss)  # with its graph, as a loop that logs later does
        if step == 2:
            keep_components(layer, KEEP, optimizer)
        optimizer.step()
        optimizer.zero_grad()
    fresh = make_layer()
    keep_components(fresh, KEEP)
    assert layer.lora_A.shape == fresh.lora_A.shape
    assert not torch.equal(layer.lora_A, fresh.lora_A)
    loss_of(layer, 9).backward()
    assert layer.lora_A.grad.shape == (3, 7)


def test_a_graph_that_is_still_to_be_used_is_an_error_that_says_so() -> None:
    layer = make_layer()
    loss = loss_of(layer, 0)
    with pytest.raises(RuntimeError, match="a forward without its backward pass"):
        keep_components(layer, KEEP)
    assert loss.requires_grad


def test_removal_between_steps_without_gradients() -> None:
    layer = make_layer()
    optimizer = torch.optim.AdamW(adapters(layer))
    keep_components(layer, KEEP, optimizer)
    assert layer.lora_A.grad is None
    loss_of(layer, 0).backward()
    optimizer.step()
    assert optimizer.state[layer.lora_A]["exp_avg"].shape == (3, 7)


def test_a_learned_mask_shrinks_with_its_gradient_and_moments() -> None:
    layer = make_layer(LearnedRankMask(5))
    logits = layer.gate.logits
    optimizer = torch.optim.AdamW(adapters(layer), lr=0.1)
    for step in range(2):
        optimizer.zero_grad()
        loss_of(layer, step).backward()
        optimizer.step()
    value, grad = logits.detach().clone(), logits.grad.clone()
    moment = optimizer.state[logits]["exp_avg"].clone()
    assert grad.any()
    keep_components(layer, KEEP, optimizer)
    assert layer.gate.logits is logits
    assert torch.equal(logits, value[KEEP])
    assert torch.equal(logits.grad, grad[KEEP])
    assert torch.equal(optimizer.state[logits]["exp_avg"], moment[KEEP])


def test_a_step_mask_keeps_the_draw_of_the_survivors() -> None:
    gate = StepMask(5, 0.5)
    gate.mask.copy_(torch.arange(5.0))
    keep_components(make_layer(gate), KEEP)
    assert gate.mask.tolist() == [1.0, 2.0, 4.0]


def test_a_gate_that_cannot_lose_ranks_is_refused() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(5, 5))

        def forward(self, z: Tensor) -> Tensor:
            return z @ self.scale

    with pytest.raises(
        ValueError, match=r"Scale.scale has shape \(5, 5\) at rank 5: .* must have shape \(r,\)"
    ):
        keep_components(make_layer(Scale()), KEEP)
    keep_components(make_layer(nn.Dropout(0.5)), KEEP)  # holds nothing for a component


def test_ranks_fall_and_come_back_up_to_the_first() -> None:
    layer = make_layer(StepMask(5, 0.5))
    match_ranks([(layer, 5)])
    assert layer.rank == 5
    match_ranks([(layer, 2)])
    assert layer.lora_B.shape == (6, 2)
    match_ranks([(layer, 4)])
    assert (layer.rank, layer.lora_A.shape[0], len(layer.gate.mask)) == (4, 4, 4)
    match_ranks([(layer, 0), (layer, 3)])
    assert layer.lora_B.shape == (6, 3)
    with pytest.raises(ValueError, match="a saved rank of 6 does not fit a layer of rank 5"):
        match_ranks([(layer, 6)])


def test_an_optimizer_that_packs_its_state_is_refused() -> None:
    layer = LoRALinear(nn.Linear(6, 5), r=4, lora_alpha=4)
    optimizer = Adafactor(layer.parameters(), lr=1e-2)  # remembers rows and columns
    layer(torch.randn(3, 6)).sum().backward()
    optimizer.step()
    with pytest.raises(ValueError, match="Adafactor keeps row_var in another shape .*AdamW"):
        keep_components(layer, torch.tensor([0, 2]), optimizer)
    assert layer.rank == 4
    assert layer.lora_A.shape == (4, 6)


def test_a_fused_optimizer_goes_on_like_a_plain_one() -> None:
    trained = []
    for fused in (False, True):
        torch.manual_seed(0)
        layer = LoRALinear(nn.Linear(7, 5).requires_grad_(False), 6, 6)
        layer.reset_parameters(False)
        parameters = [layer.lora_A, layer.lora_B]
        optimizer = torch.optim.AdamW(parameters, lr=0.1, fused=fused)
        x = torch.randn(9, 7)
        for step in range(6):
            layer(x).square().sum().backward()
            if step in (2, 4):
                keep_components(layer, torch.arange(0, layer.rank, 2), optimizer)
            optimizer.step()
            optimizer.zero_grad()
        trained.append([p.detach().clone() for p in parameters])
    for plain, fused_one in zip(*trained, strict=True):
        torch.testing.assert_close(fused_one, plain)


class WholeScale(nn.Module):
    """Computes with all it holds, alive or dead."""

    def __init__(self, r: int) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.ones(r))

    def forward(self, z: Tensor) -> Tensor:
        return z * self.values


@pytest.mark.parametrize("several", [False, True])
def test_gates_that_can_lose_components_are_told_from_those_that_cannot(
    several: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed.parameters, "is_distributed", lambda: several)
    before = torch.get_rng_state()
    good = [RankDropout(5, 0.5), StepMask(5), LearnedRankMask(5), RankScale(5, 1.0), nn.Dropout()]
    layers = [make_layer(gate) for gate in good]
    torch.set_rng_state(before)
    check_gates(layers)
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(ValueError, match=r"the rank_gate Linear cannot lose components"):
        check_gates([make_layer(nn.Linear(5, 5))])
    if several:
        with pytest.raises(ValueError, match=r"WholeScale .* compute with the front, val"):
            check_gates([make_layer(WholeScale(5))])
    else:
        check_gates([make_layer(WholeScale(5))])


def test_a_pruning_method_refuses_such_a_gate_when_it_is_attached(
    tiny_llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    PrunedLoRA(r=4, target_r=2, rank_gate=WholeScale).attach(tiny_llama())
    monkeypatch.setattr(distributed.parameters, "is_distributed", lambda: True)
    with pytest.raises(ValueError, match="WholeScale cannot lose components, which this method"):
        PrunedLoRA(r=4, target_r=2, rank_gate=WholeScale).attach(tiny_llama())
    LoRA(r=4, rank_gate=WholeScale).attach(tiny_llama())  # which removes none


def test_a_mask_is_not_taken_for_indices() -> None:
    with pytest.raises(UserError, match=r"are given by index, int64, not torch\.bool"):
        keep_components(make_layer(), torch.tensor([True, False, True, True, True]))
