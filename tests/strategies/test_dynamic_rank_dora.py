"""Dynamic DoRA against the authors' algorithm on whole matrices, over a whole schedule."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_peft import trainable_parameters
from lightning_peft.adapters import adapter_layers
from lightning_peft.adapters.gates import rank_scale
from lightning_peft.pruning.sensitivity import cubic_budget
from lightning_peft.strategies import RankDropout
from lightning_peft.strategies.dynamic_rank_dora import DynamicRankDoRA
from lightning_peft.testing import check_strategy

R, TARGET, TOTAL, EVERY, BETA, WEIGHT = 6, 3, 40, 4, 0.9, 0.1
FIRST, LAST = 6, 20  # of 40 steps, by start_ratio 0.15 and final_ratio 0.5


def values_of(layer: Any) -> Tensor:
    return rank_scale(layer.gate).values


def data(step: int) -> tuple[Tensor, Tensor]:
    stream = torch.Generator().manual_seed(step)
    x = torch.randn(8, 4, generator=stream, dtype=torch.float64)
    return x, torch.stack([x[:, 0] * x[:, 1], x[:, 2]], 1)


def adamw(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=0.03)


class WholeMatrices:
    """The same network where nothing is removed: what the budget leaves out is held at zero."""

    def __init__(self, model: nn.Module, curve: str) -> None:
        self.layers, self.curve = list(adapter_layers(model).values()), curve
        self.values = [
            [nn.Parameter(t.detach().clone()) for t in (m.lora_B, values_of(m), m.lora_A)]
            for m in self.layers
        ]
        self.optimizer = adamw([t for own in self.values for t in own])
        self.smooth = [torch.zeros(R, dtype=torch.float64) for _ in self.layers]
        self.gone: list[Tensor] = []

    def parts(self, own: list[nn.Parameter]) -> Tensor:
        B, c, A = own
        return torch.einsum("ik,k,kj->kij", B, c, A)

    def loss(self, step: int) -> Tensor:
        x, y = data(step)
        outs = []
        for layer, own in zip(self.layers, self.values, strict=True):
            weight = layer.base.weight + layer.scaling * self.parts(own).sum(0)
            outs.append(x @ weight.T + layer.base.bias)
            x = outs[-1].tanh()
        loss = (outs[-1] - y).square().mean()
        if self.gone:
            return loss
        vectors = [v for B, _, A in self.values for i in range(R) for v in (B[:, i], A[i])]
        spread = [(v - v.mean()).square().sum() / (len(v) - 1) for v in vectors]
        return loss + WEIGHT * sum(spread) / len(spread)

    def step(self, step: int) -> None:
        self.optimizer.zero_grad()
        self.loss(step).backward()
        self.optimizer.step()
        with torch.no_grad():
            if not self.gone:
                self.decide(step + 1)
            for own, gone in zip(self.values, self.gone, strict=False):
                own[1][gone] = 0

    def decide(self, done: int) -> None:
        for own, smooth in zip(self.values, self.smooth, strict=True):
            parts = self.parts(own)
            norms = torch.stack([torch.linalg.matrix_norm(part) for part in parts])
            smooth.mul_(BETA).add_(
                (1 - BETA) * norms / (torch.linalg.matrix_norm(parts.sum(0)) + 1e-8)
            )
        if done != LAST and (done <= FIRST or (done - FIRST) % EVERY):
            return
        start, target = R * len(self.layers), TARGET * len(self.layers)
        count = int((start - target) * ((done - FIRST) / (LAST - FIRST)) ** 3)
        if self.curve == "early":
            count = start - cubic_budget(done, start, target, FIRST, TOTAL - LAST, TOTAL)
        lowest = torch.cat(self.smooth).sort().values[count - 1] if count else -1
        gone = [smooth <= lowest for smooth in self.smooth]
        for own, out in zip(self.values, gone, strict=True):
            own[1][out] = 0
        if done == LAST:
            self.gone = gone


@pytest.mark.parametrize("curve", ["late", "early"])
def test_a_whole_schedule_is_that_of_whole_matrices(two_linears, curve) -> None:
    model = two_linears().double()
    torch.manual_seed(1)
    strategy = DynamicRankDoRA(
        r=R, target_r=TARGET, prune_every=EVERY, total_step=TOTAL, curve=curve
    )
    strategy.attach(model)
    model.double()
    reference = WholeMatrices(model, curve)
    optimizer = strategy.make_optimizer(model, adamw)
    layers = list(adapter_layers(model).values())
    living = []
    came_back = False
    for step in range(TOTAL):
        x, y = data(step)
        loss = (model(x) - y).square().mean() + strategy.penalty(model)
        torch.testing.assert_close(loss, reference.loss(step), rtol=1e-8, atol=1e-10)
        loss.backward()
        optimizer.step()
        strategy.after_step(model, optimizer, step)
        optimizer.zero_grad()
        before = [own[1] == 0 for own in reference.values]
        reference.step(step)
        for index, (layer, own) in enumerate(zip(layers, reference.values, strict=True)):
            B, c, A = own
            alive = ~reference.gone[index] if reference.gone else torch.ones(R, dtype=torch.bool)
            came_back |= bool(step and (before[index] & (c != 0)).any())
            assert layer.rank == alive.sum()
            assert ((values_of(layer) == 0) == (c[alive] == 0)).all()
            ours = layer.lora_B, values_of(layer), layer.lora_A
            for one, other in zip(ours, (B[:, alive], c[alive], A[alive]), strict=True):
                torch.testing.assert_close(one.detach(), other.detach(), rtol=1e-6, atol=1e-8)
        living.append(sum(int((values_of(layer) != 0).sum()) for layer in layers))
    assert came_back
    assert living[FIRST] == R * 2
    assert living[LAST - 1 :] == [TARGET * 2] * (TOTAL - LAST + 1)
    middle = living[FIRST + EVERY - 1]
    assert middle < R * 2 if curve == "early" else middle == R * 2
    assert {d["step"] for d in strategy.decisions} == {LAST - 1}
    assert strategy.penalty(model) == 0.0


def test_it_begins_as_the_authors_code(two_linears) -> None:
    strategy = DynamicRankDoRA(r=R, target_r=TARGET)
    torch.manual_seed(3)
    strategy.attach(model := two_linears())
    torch.manual_seed(3)
    for layer in adapter_layers(model).values():
        down, up = nn.Linear(layer.in_features, R, False), nn.Linear(R, layer.out_features, False)
        assert not values_of(layer).any()
        assert layer.lora_A.abs().max() <= math.sqrt(6 / layer.in_features)
        assert layer.lora_B.abs().max() <= math.sqrt(6 / R)
        # Larger than torch's own start by √6.
        assert layer.lora_A.std() > down.weight.std() * 1.5
        assert layer.lora_B.std() > up.weight.std() * 1.5


def test_the_count_at_the_end_is_told_before(tiny_llama) -> None:
    model, other = tiny_llama(), tiny_llama()
    strategy = DynamicRankDoRA(r=4, target_r=2)
    strategy.attach(model)
    plain = DynamicRankDoRA(r=2, target_r=2)
    plain.attach(other)
    assert strategy.final_parameters(model) == trainable_parameters(other)


def test_it_says_that_it_needs_the_number_of_steps(two_linears) -> None:
    strategy = DynamicRankDoRA(r=3, target_r=2)
    strategy.attach(model := two_linears())
    endless: Any = SimpleNamespace(global_step=0, estimated_stepping_batches=math.inf)
    strategy.on_train_start(endless, None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="total_step") as error:
        strategy.after_step(model, torch.optim.SGD(model.parameters(), 0.1), 0)
    assert str(error.value) == (
        "total_step: DynamicRankDoRA's budget depends on the number of optimizer steps; give "
        "total_step, since no trainer knows it."
    )


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"r": 4, "target_r": 5}, "target_r must lie between 1 and r = 4, got 5."),
        ({"start_ratio": -0.1}, "start_ratio must lie in [0, 1), got -0.1."),
        ({"final_ratio": 1.0}, "final_ratio must lie in [0, 1), got 1.0."),
        (
            {"start_ratio": 0.5},
            "start_ratio + final_ratio must be below 1, so that the budget can fall between them, "
            "got 0.5 + 0.5.",
        ),
        ({"prune_every": 0}, "prune_every must be at least 1, got 0."),
        ({"total_step": 0}, "total_step must be at least 1, got 0."),
        ({"beta": 1.0}, "beta must lie in [0, 1), got 1.0."),
        (
            {"equilibrium_weight": -1.0},
            "equilibrium_weight must be a finite number of at least 0, got -1.0.",
        ),
        ({"curve": "cubic"}, "curve must be late or early, got 'cubic'."),
    ],
)
def test_wrong_arguments_are_refused(arguments, sentence) -> None:
    with pytest.raises(ValueError, match="must") as error:
        DynamicRankDoRA(**arguments)
    assert str(error.value) == sentence


SCHEDULE: dict[str, Any] = {"r": 4, "target_r": 2, "prune_every": 2, "total_step": 12}


@pytest.mark.parametrize(
    "arguments",
    [
        {"final_ratio": 0.25},
        pytest.param(
            {"start_ratio": 0.0, "final_ratio": 0.0, "curve": "early"}, marks=pytest.mark.long
        ),
        pytest.param(
            {"rank_gate": lambda r: RankDropout(r, 0.3), "rank_pattern": {"v_proj": 1}},
            marks=pytest.mark.long,
        ),
    ],
)
def test_keeps_a_strategys_promises(arguments) -> None:
    check_strategy(DynamicRankDoRA(**SCHEDULE, **arguments))


@pytest.mark.slow
def test_two_processes_agree() -> None:
    check_strategy(DynamicRankDoRA(**SCHEDULE), processes=2)
