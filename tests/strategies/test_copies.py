"""A copy of a model and its strategy trains by itself, and as the original would."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch

from lightning_peft.adapters import adapter_state_dict
from lightning_peft.strategies import (
    AdaLoRA,
    AdapterStrategy,
    DropLoRA,
    IncreLoRA,
    LayerRemoval,
    PrunedLoRA,
)
from lightning_peft.testing.loop import Run

STRATEGIES: list[Callable[[], AdapterStrategy]] = [
    lambda: AdaLoRA(r=4, target_r=2, total_step=8, deltaT=2),
    lambda: DropLoRA(r=4, mask="step"),
    lambda: IncreLoRA(init_warmup=1, incre_interval=2, top_h=4, target_r=3),
    lambda: LayerRemoval(r=2, every=3, count=4),
    lambda: PrunedLoRA(r=4, target_r=2, criterion="wanda", start_step=5, prune_count=1),
]


def through_a_file(value: Any) -> Any:
    torch.save(value, file := io.BytesIO())
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("make", STRATEGIES, ids=lambda make: type(make()).__name__)
@pytest.mark.parametrize("copied", [copy.deepcopy, through_a_file])
def test_a_copy_trains_by_itself_as_the_original_would(copied: Any, make: Any) -> None:
    run = Run(make)
    run.prepare()
    run.train(range(4))
    stream = torch.get_rng_state()
    other = copy.copy(run)
    copies = copied((run.model, run.strategy, run.optimizer))
    other.model, other.strategy, other.optimizer = copies
    states = []
    for own in (run, other):
        torch.set_rng_state(stream)
        own.train(range(4, 8))
        states.append(adapter_state_dict(own.model))
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[1][name], tensor) for name, tensor in states[0].items())
    assert run.strategy.decisions == other.strategy.decisions
    if not isinstance(run.strategy, DropLoRA):
        assert run.strategy.decisions


@pytest.mark.parametrize("copied", [copy.deepcopy, through_a_file])
def test_a_forgotten_call_is_said_for_a_copy_too(
    copied: Any, two_linears: Any, optimizer_of: Any, backward: Any
) -> None:
    strategy = PrunedLoRA(r=4, target_r=2)
    strategy.attach(two_linears())
    model, strategy = copied((strategy.model, strategy))
    backward(model)
    with pytest.raises(RuntimeError, match="acts at every step, but before_step was not called"):
        optimizer_of(model).step()


def test_a_copy_without_its_strategy_is_refused_where_the_strategy_would_see_nothing() -> None:
    run = Run(STRATEGIES[2])
    run.prepare()
    run.model = copy.deepcopy(run.model)
    run.make_optimizer()
    run.backward(0)
    with pytest.raises(RuntimeError, match=r"copy it together with its model: copy\.deepcopy"):
        run.update(0)
