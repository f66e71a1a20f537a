"""AdaLoRA against PEFT's: forward, penalty, importance and budget over a whole schedule."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_peft.adapters import adapter_layers
from lightning_peft.adapters.gates import rank_scale
from lightning_peft.pruning.sensitivity import cubic_budget
from lightning_peft.strategies import AdaLoRA, RankDropout
from lightning_peft.testing import check_strategy

TARGETS = ["q_proj", "v_proj", "down_proj"]
SCHEDULE = {"tinit": 2, "tfinal": 4, "deltaT": 2, "total_step": 14}
FINAL = 10


def peft_config(scaling: float) -> Any:
    peft = pytest.importorskip("peft")
    return peft.AdaLoraConfig(
        init_r=6,
        target_r=3,
        lora_alpha=scaling * (6 + 1e-5),  # PEFT divides by that
        target_modules=TARGETS,
        orth_reg_weight=0.5,
        task_type="CAUSAL_LM",
        **SCHEDULE,
    )


def values_of(layer: Any) -> torch.Tensor:
    return rank_scale(layer.gate).values


def test_a_whole_schedule_is_pefts(pair, random_batch) -> None:
    strategy = AdaLoRA(r=6, target_r=3, target_modules=TARGETS, **SCHEDULE)
    ours, theirs = pair(strategy, peft_config(2.0), {"lora_E": lambda layer: values_of(layer)})
    layers = adapter_layers(ours)
    others = {name: theirs.get_submodule(f"base_model.model.{name}") for name in layers}
    for name, layer in layers.items():
        with torch.no_grad():
            values_of(layer).normal_(std=0.5)
            others[name].lora_E["default"].copy_(values_of(layer)[:, None])
    pairs = [
        (model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3))
        for model in (ours, theirs)
    ]
    budgets = []
    for step in range(14):
        losses = []
        for model, optimizer in pairs:
            optimizer.zero_grad()
            loss = model(**random_batch(step)).loss
            if model is ours:  # PEFT adds the penalty itself
                loss = loss + strategy.penalty(ours)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        if step <= FINAL:
            torch.testing.assert_close(*losses)
        strategy.after_step(ours, pairs[0][1], step)
        theirs.base_model.update_and_allocate(step)
        ranks = {name: int((values_of(layer) != 0).sum()) for name, layer in layers.items()}
        alive = {name: int((o.lora_E["default"] != 0).sum()) for name, o in others.items()}
        assert ranks == alive
        budgets.append(sum(ranks.values()))
        for name, layer in layers.items():
            if step > FINAL:
                continue
            part = others[name]
            change = (part.lora_B["default"] * part.lora_E["default"].T) @ part.lora_A["default"]
            torch.testing.assert_close(
                layer.delta_weight(), 2.0 * change.detach(), rtol=1e-3, atol=1e-5
            )
    assert budgets[0] == 6 * len(layers)
    assert budgets[-1] == 3 * len(layers)
    assert len(set(budgets)) >= 4
    # Where PEFT keeps components at zero, ours are gone, and with them their part of the penalty.
    assert sum(layer.lora_A.shape[0] for layer in layers.values()) == 3 * len(layers)
    assert len({layer.rank for layer in layers.values()}) > 1


@pytest.mark.parametrize("step", range(0, 22, 3))
def test_the_budget_is_pefts(step) -> None:
    pytest.importorskip("peft")
    from peft.tuners.adalora.layer import RankAllocator

    allocator = RankAllocator.__new__(RankAllocator)
    allocator.peft_config = type("", (), {"tinit": 4, "tfinal": 5, "total_step": 20, "deltaT": 1})
    allocator.init_bgt, allocator.target_bgt = 60, 25
    assert cubic_budget(step, 60, 25, 4, 5, 20) == allocator.budget_schedule(step)[0]


def test_it_says_that_it_needs_the_number_of_steps(tiny_llama, random_batch) -> None:
    strategy = AdaLoRA(r=3, target_r=2)
    strategy.attach(model := tiny_llama())
    with pytest.raises(ValueError, match="total_step: AdaLoRA's budget depends on the number"):
        strategy.after_step(model, torch.optim.SGD(model.parameters(), 0.1), 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"r": 4, "target_r": 5}, "target_r must lie between 1 and r = 4, got 5"),
        ({"deltaT": 0}, "deltaT must be at least 1, got 0"),
        ({"beta1": 1.0}, r"beta1 must lie in \(0, 1\), got 1.0"),
        ({"tinit": 5, "tfinal": 5, "total_step": 10}, r"tinit \+ tfinal must be below total_step"),
    ],
)
def test_numbers_outside_their_range_are_refused(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        AdaLoRA(**arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        {"tfinal": 3},
        pytest.param({"tfinal": 0}, marks=pytest.mark.long),
        {"tfinal": 3, "rank_gate": lambda r: RankDropout(r, 0.3)},
    ],
)
def test_keeps_a_strategys_promises(arguments) -> None:
    check_strategy(AdaLoRA(r=4, target_r=2, total_step=12, **arguments))
