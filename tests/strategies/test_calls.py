"""Whoever forgets a call around an optimizer step is told so."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
from torch import nn

from lightning_peft.errors import UserError
from lightning_peft.strategies import (
    EVA,
    AdaLoRA,
    AdapterStrategy,
    DropLoRA,
    DynamicRankDoRA,
    ElaLoRA,
    FisherLoRA,
    GoRA,
    IncreLoRA,
    LayerRemoval,
    LoRA,
    LoRADrop,
    LoRAGA,
    PrunedLoRA,
    SoRA,
)
from lightning_peft.strategies.calls import CallWatch
from lightning_peft.testing.loop import Run


class Both(AdapterStrategy):
    """Acts before and after each step."""

    def before_step(self, model: nn.Module, optimizer: Any, global_step: int) -> None:
        pass

    def after_step(self, model: nn.Module, optimizer: Any, global_step: int) -> None:
        super().after_step(model, optimizer, global_step)


@pytest.mark.parametrize(
    "make",
    [
        lambda: PrunedLoRA(r=4, target_r=2),
        lambda: DropLoRA(r=4, mask="step"),
        lambda: Both(r=2),
    ],
)
def test_a_strategy_that_acts_at_steps_says_so_when_nobody_calls_it(
    make, two_linears, optimizer_of, backward
) -> None:
    model, strategy = two_linears(), make()
    strategy.attach(model)
    optimizer = optimizer_of(model)
    needs_both = isinstance(strategy, Both)
    needs_before = not isinstance(strategy, DropLoRA)
    backward(model)
    if not needs_before:
        optimizer.step()  # after_step may still come
    missing = "before_step" if needs_before else "after_step"
    with pytest.raises(RuntimeError, match=f"acts at every step, but {missing} was not called"):
        optimizer.step()
    if needs_both:
        with pytest.raises(RuntimeError, match="but before_step and after_step was not called"):
            optimizer.step()


def test_one_forgotten_call_is_named(two_linears, optimizer_of, backward) -> None:
    model, strategy = two_linears(), DropLoRA(r=4, mask="step")
    strategy.attach(model)
    optimizer = optimizer_of(model)
    backward(model)
    strategy.before_step(model, optimizer, 0)
    optimizer.step()
    with pytest.raises(RuntimeError, match="but after_step was not called"):
        optimizer.step()


@pytest.mark.parametrize("strategy", [LoRA(r=2), DropLoRA(r=2)])
def test_a_strategy_that_does_nothing_at_steps_needs_no_calls(
    strategy, two_linears, optimizer_of, backward
) -> None:
    model = two_linears()
    strategy.attach(model)
    optimizer = optimizer_of(model)
    for _ in range(3):
        backward(model)
        optimizer.step()


def test_other_optimizers_and_dead_strategies_are_left_alone(
    two_linears, optimizer_of, backward
) -> None:
    strategy = PrunedLoRA(r=4, target_r=2)
    strategy.attach(two_linears())
    other = two_linears()
    optimizer = optimizer_of(other)
    backward(other)
    optimizer.step()
    del strategy
    gc.collect()
    for _ in range(2):
        optimizer.step()


class Looking(AdapterStrategy):
    """Looks at data, and remembers nothing of it."""

    def prepare(self, model: nn.Module, *args: Any, **more: Any) -> None:
        pass


LOOKING = [EVA, FisherLoRA, GoRA, LoRADrop, LoRAGA, Looking]


@pytest.mark.parametrize("kind", LOOKING)
def test_a_strategy_that_looks_at_data_says_so_when_it_was_not_prepared(kind: Any) -> None:
    run = Run(lambda: kind(r=2))
    run.make_optimizer()
    sentence = (
        f"{kind.__name__} looks at data before training, but prepare was not called: call "
        "strategy.prepare(model, sample, loss) after strategy.attach(model) and before the "
        "optimizer is made, or load the strategy's saved state."
    )
    for step in range(2):
        with pytest.raises(UserError) as error:
            run.train([step])
        assert str(error.value) == sentence


@pytest.mark.parametrize("kind", LOOKING)
def test_a_strategy_that_looked_or_resumes_trains(kind: Any) -> None:
    run = Run(lambda: kind(r=2))
    run.prepare()
    run.train(range(2))
    resumed = Run(lambda: kind(r=2), initialize=False)
    state = run.strategy.state_dict()
    resumed.strategy.restructure(resumed.model, state)
    resumed.strategy.load_state_dict(state)
    resumed.make_optimizer()
    resumed.train([2])


@pytest.mark.parametrize(
    "make",
    [
        lambda: AdaLoRA(r=4, target_r=2, total_step=100),
        lambda: DynamicRankDoRA(r=4, target_r=2, total_step=100),
        lambda: ElaLoRA(r=4, init_warmup=10, final_warmup=10, total_step=100),
        lambda: IncreLoRA(),
        lambda: LayerRemoval(r=4),
        lambda: PrunedLoRA(r=4, target_r=2, start_step=50),
        lambda: SoRA(r=4, total_step=100),
    ],
)
def test_an_optimizer_that_packs_its_state_is_refused_at_its_first_step(make: Any) -> None:
    run = Run(make)
    run.prepare()
    trained = list(run.trained().values())
    run.optimizer = torch.optim.Adafactor(trained, lr=0.01)
    run.backward(0)
    run.strategy.before_step(run.model, run.optimizer, 0)
    with pytest.raises(UserError, match=r"^Adafactor keeps row_var in another shape .*AdamW\.$"):
        run.optimizer.step()


def test_where_ranks_stay_any_optimizer_will_do(two_linears: Any, backward: Any) -> None:
    DropLoRA(r=4, mask="token").attach(model := two_linears())
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adafactor(trained, lr=0.01)
    backward(model)
    optimizer.step()


# The watch by itself, which knows no strategy.


def watched(needed: set[str], follows: tuple[str, ...] = ("after",)) -> tuple[CallWatch, Any]:
    parameter = nn.Parameter(torch.ones(2))
    watch = CallWatch("Clock", needed, lambda: [parameter], follows)
    return watch, torch.optim.SGD([parameter], lr=0.1)


def test_a_call_before_each_step_is_missed_at_once_and_one_after_at_the_next() -> None:
    watch, optimizer = watched({"before", "after"})
    watch.made("before")
    optimizer.step()  # "after" may still come
    watch.made("before")
    with pytest.raises(RuntimeError, match="Clock acts at every step, but after was not called"):
        optimizer.step()
    watch.begin()
    watch.made("before")
    optimizer.step()
    watch.made("after")
    with pytest.raises(RuntimeError, match="but before was not called"):
        optimizer.step()


def test_a_noted_method_is_called_with_its_arguments_and_can_be_copied() -> None:
    watch, optimizer = watched({"before"})
    seen: list[Any] = []
    method = watch.noting("before", lambda *args, **more: seen.append((args, more)))
    method(1, step=2)
    optimizer.step()
    assert seen == [((1,), {"step": 2})]
    assert copy.copy(method).name == "before"


def test_optimizers_that_share_the_step_are_one_step() -> None:
    watch, first = watched({"before"})
    second = torch.optim.SGD(first.param_groups[0]["params"], lr=0.1)
    for _ in range(3):
        watch.made("before")
        first.step()
        second.step()
    with pytest.raises(RuntimeError, match="but before was not called"):
        first.step()


def test_who_needs_nothing_and_who_is_gone_watches_nothing() -> None:
    watch, optimizer = watched(set())
    optimizer.step()
    watch, optimizer = watched({"before"})
    del watch
    gc.collect()
    optimizer.step()
