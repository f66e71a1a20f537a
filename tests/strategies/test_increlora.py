"""IncreLoRA against full-size matrices, the authors' importance and an Adam that is written out."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_peft.adapters import (
    adapter_state_dict,
    load_adapter_state,
    lora_layers,
    trainable_parameters,
)
from lightning_peft.adapters.gates import RankScale, rank_scale
from lightning_peft.errors import UserError
from lightning_peft.strategies import RankDropout
from lightning_peft.strategies.increlora import IncreLoRA, Reserving
from lightning_peft.testing import check_strategy, tiny_llama
from lightning_peft.testing.loop import STEPS, Run
from lightning_peft.testing.promises import check_resume

sys.path.insert(0, str(Path(__file__).parent))
from masked_triplets import LEARNING_RATE, masked_model  # noqa: E402

TARGETS = ["q_proj", "down_proj"]
EVERY = {"init_warmup": 1, "incre_interval": 2}


class Reference:
    """The method as the authors' code has it, for a model of :class:`Triplet`."""

    def __init__(self, strategy: IncreLoRA, make: Any, layers: Any) -> None:
        self.strategy, self.layers = strategy, layers
        reserve = strategy.incre_rank_num if strategy.advance_learn else 0
        self.model, self.triplets = masked_model(make, layers, 12, reserve)
        self.S = dict.fromkeys(layers, 0.0)
        self.U = dict.fromkeys(layers, 0.0)

    def backward(self, batches: list[Any]) -> float:
        self.now = dict.fromkeys(self.layers, 0.0)
        distances = [d for t in self.triplets.values() for d in t.distances()]
        total = 0.1 * torch.stack(distances).mean()
        total.backward()
        for batch in batches:
            loss = self.model(**batch).loss / len(batches)
            loss.backward()
            total = total + loss
            for name, t in self.triplets.items():
                product = (t.change * t.change.grad).abs()
                self.now[name] += float(product.detach().sum() / math.sqrt(product.numel()))
        return float(total.detach())

    def before_step(self, step: int) -> None:
        """Decide by itself; drawn values are taken from ours, which has acted already."""
        strategy, left = self.strategy, self.left()
        if left <= 0:
            return
        for name, now in self.now.items():
            self.S[name] = 0.85 * self.S[name] + 0.15 * now
            self.U[name] = 0.85 * self.U[name] + 0.15 * abs(now - self.S[name])
        if step <= strategy.init_warmup or step % strategy.incre_interval:
            return
        score = {name: self.S[name] * self.U[name] for name in self.S}
        able = [name for name, t in self.triplets.items() if len(t.used()) < strategy.max_r]
        for name in sorted(able, key=score.__getitem__, reverse=True)[: strategy.top_h]:
            left = self.left()
            used = len(self.triplets[name].used())
            self.grow(name, min(strategy.incre_rank_num, strategy.max_r - used, left), step)
        if self.left() == 0:
            for t in self.triplets.values():
                t.alive, t.held = t.used(), []

    def left(self) -> int:
        used = sum(len(t.used()) for t in self.triplets.values())
        return self.strategy.target_r * len(self.triplets) - used

    def grow(self, name: str, count: int, step: int) -> None:
        t, ours = self.triplets[name], self.layers[name]
        if self.strategy.advance_learn:
            for slot in t.held[:count]:
                t.born["E"][slot] = step
            t.held, count = t.held[count:], ours.rank - len(t.alive)
        for _ in range(max(count, 0)):  # ours has no reserve any more at the end
            slot = len(t.alive)
            t.copy(slot, ours, slot)
            t.alive.append(slot)
            keys = "PQ" if self.strategy.advance_learn else "PEQ"
            t.held += [slot] * self.strategy.advance_learn
            for key in keys:
                t.born[key][slot] = step

    def step(self, step: int) -> None:
        warmup = self.strategy.lr_warmup
        for t in self.triplets.values():
            t.step(
                step,
                lambda now, born: (
                    min(max(now - born - 1, 0) / max(warmup, 1), 1.0) if warmup else 1.0
                ),
            )
        self.model.zero_grad()


@pytest.mark.parametrize(
    ("arguments", "micro", "grown"),
    [
        ({"target_r": 4, "top_h": 3, "incre_rank_num": 1}, 1, [3, 3, 3, 3]),
        ({"target_r": 4, "top_h": 2, "lr_warmup": 0}, 2, [4, 4, 4]),
        ({"target_r": 4, "top_h": 3, "incre_rank_num": 1, "lr_warmup": 5}, 1, [3, 3, 3, 3]),
        ({"target_r": 3, "top_h": 3, "advance_learn": False, "lr_warmup": 3}, 2, [3, 3, 2]),
        ({"target_r": 4, "top_h": 2, "max_r": 5, "incre_rank_num": 3}, 1, [6, 2, 4]),
    ],
)
def test_growth_is_the_papers_with_full_size_matrices(
    tiny_llama: Any, random_batch: Any, arguments: Any, micro: int, grown: list[int]
) -> None:
    strategy = IncreLoRA(target_modules=TARGETS, **EVERY, **arguments)
    torch.manual_seed(0)
    strategy.attach(ours := tiny_llama())
    layers = lora_layers(ours)
    reference = Reference(strategy, tiny_llama, layers)
    parameters = [p for p in ours.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=LEARNING_RATE)
    totals = [4]
    for step in range(16):
        batches = [random_batch(100 * step + i) for i in range(micro)]
        (total := strategy.penalty(ours)).backward()
        for batch in batches:
            loss = ours(**batch).loss / micro
            loss.backward()
            total = total + loss
        assert math.isclose(float(total.detach()), reference.backward(batches), rel_tol=1e-5)
        strategy.before_step(ours, optimizer, step)
        reference.before_step(step)
        optimizer.step()
        reference.step(step)
        strategy.after_step(ours, optimizer, step)
        optimizer.zero_grad()
        assert_same(layers, reference)
        totals.append(sum(len(t.used()) for t in reference.triplets.values()))
    assert [b - a for a, b in zip(totals, totals[1:], strict=False) if b > a] == grown
    assert totals[-1] == strategy.target_r * len(layers)
    assert len({layer.rank for layer in layers.values()}) > 1
    del loss, total


def assert_same(layers: Any, reference: Reference) -> None:
    for name, layer in layers.items():
        t = reference.triplets[name]
        assert layer.rank == len(t.alive), name
        torch.testing.assert_close(layer.active_A.detach(), t.Q[t.alive], rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(layer.active_B.detach(), t.P[:, t.alive], rtol=1e-3, atol=1e-5)
        values = next(m for m in layer.gate.modules() if isinstance(m, Reserving)).values
        torch.testing.assert_close(values.detach(), t.E[t.alive], rtol=1e-3, atol=1e-5)


def test_decisions_say_the_ranks_in_use_and_reserves_are_gone_at_the_end() -> None:
    run = Run(lambda: IncreLoRA(target_r=2, top_h=4, **EVERY))
    run.prepare()
    layers = lora_layers(run.model)
    assert {layer.rank for layer in layers.values()} == {2}  # one in use, one in reserve
    assert {layer.r for layer in layers.values()} == {1}
    run.train(range(STEPS))
    ranks = dict.fromkeys(layers, 1)
    for decision in run.strategy.decisions:
        assert decision["event"] == "added"
        assert decision["rank"] == ranks[decision["layer"]] + 1
        ranks[decision["layer"]] += 1
    assert ranks == {name: layer.rank for name, layer in layers.items()}
    assert [d["step"] for d in run.strategy.decisions] == [
        s for s in (2, 4, 6) for _ in range(4)
    ] + [8] * 2


def test_the_parameters_at_the_end_are_those_of_the_target() -> None:
    run = Run(lambda: IncreLoRA(target_r=3, top_h=14, target_modules=["q_proj"], **EVERY))
    run.prepare()
    run.train(range(STEPS))
    counted = Run(lambda: IncreLoRA(target_r=3, target_modules=["q_proj"]), initialize=False)
    expected = 2 * 3 * (32 + 32 + 1)
    assert counted.strategy.final_parameters(counted.model) == expected
    assert trainable_parameters(run.model) == expected


def test_the_tensors_alone_say_which_components_are_reserves() -> None:
    make = lambda: IncreLoRA(target_r=3, top_h=14, **EVERY)  # noqa: E731
    run = Run(make)
    run.prepare()
    for steps, reserve in ((3, 1), (STEPS, 0)):
        run.train(range(steps - 3, steps))
        for initialize in (True, False):
            other = Run(make, initialize=initialize)
            load_adapter_state(other.model, adapter_state_dict(run.model))
            gates = [rank_scale(layer.gate) for layer in lora_layers(other.model).values()]
            assert {gate.reserve for gate in gates} == {reserve}  # type: ignore[attr-defined]
            assert torch.equal(other.logits(), run.logits())


@pytest.mark.parametrize(
    ("arguments", "last"),
    [
        ({"target_r": 2, "top_h": 4}, 8),  # 14 components, of which 4 come at 2, 4, 6 and 8
        ({"target_r": 3, "top_h": 99}, 4),
        ({"target_r": 2, "top_h": 4, "rank_pattern": {"q_proj": 4}}, 4),
        ({"target_r": 2, "r": 2}, 0),
    ],
)
def test_a_run_that_ends_before_the_target_is_warned_about(
    arguments: Any, last: int, recwarn: Any
) -> None:
    run = Run(lambda: IncreLoRA(**EVERY, **arguments))
    strategy, layers = run.strategy, lora_layers(run.model)
    assert isinstance(strategy, IncreLoRA)
    strategy._say_if_too_short(layers, None)
    strategy._say_if_too_short(layers, last + 1)
    assert not recwarn
    strategy._say_if_too_short(layers, last)
    sentence = (
        f"IncreLoRA reaches target_r = {strategy.target_r} at the earliest at step {last}, but "
        f"this run has {last} steps and ends below, with its reserves: lower init_warmup or "
        "incre_interval, or raise top_h or incre_rank_num."
    )
    assert [str(warning.message) for warning in recwarn] == [sentence] * bool(last)
    run.prepare()
    run.train(range(last))
    left = strategy._left(layers)
    assert (left > 0) == (last > 0)
    run.train([last])
    assert strategy._left(layers) <= 0


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        pytest.param({"lr_warmup": 5, "target_r": 4, "max_r": 4}, marks=pytest.mark.long),
        pytest.param({"advance_learn": False, "lr_warmup": 3}, marks=pytest.mark.long),
    ],
)
def test_a_run_that_is_killed_at_any_step_ends_bit_for_bit(arguments: Any) -> None:
    make = lambda: IncreLoRA(top_h=3, **EVERY, **arguments)  # noqa: E731
    run = Run(make)
    run.prepare()
    torch.manual_seed(2)
    for step in range(STEPS):
        run.train([step])
        run.saved[step + 1] = run.save()
    for after in range(1, STEPS):
        check_resume(make, run, after)


def test_gradients_that_are_not_finite_leave_the_importance_alone() -> None:
    run = Run(lambda: IncreLoRA(**EVERY))
    run.prepare()
    run.train(range(2))
    before = [average.clone() for average in run.strategy.averages]  # type: ignore[attr-defined]
    (run.model(**run.batch(2)).loss * math.inf).backward()
    run.strategy.before_step(run.model, run.optimizer, 2)
    after = run.strategy.averages  # type: ignore[attr-defined]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"r": 3}, "target_r must be at least r = 3, got 2."),
        ({"target_r": 4, "max_r": 3}, "max_r must be at least target_r = 4, got 3."),
        ({"init_warmup": -1}, "init_warmup must be at least 0, got -1."),
        ({"incre_interval": 0}, "incre_interval must be at least 1, got 0."),
        ({"top_h": 0}, "top_h must be at least 1, got 0."),
        ({"incre_rank_num": 0}, "incre_rank_num must be at least 1, got 0."),
        ({"lr_warmup": -1}, "lr_warmup must be at least 0, got -1."),
        ({"beta1": 1.0}, "beta1 must lie in (0, 1), got 1.0."),
        ({"beta2": 0.0}, "beta2 must lie in (0, 1), got 0.0."),
    ],
)
def test_numbers_outside_their_range_are_refused(arguments: Any, message: str) -> None:
    with pytest.raises(UserError) as error:
        IncreLoRA(**arguments)
    assert str(error.value) == message


@pytest.mark.parametrize(
    "arguments",
    [
        {"top_h": 4},
        pytest.param(
            {"top_h": 4, "target_r": 4, "advance_learn": False, "lr_warmup": 5},
            marks=pytest.mark.long,
        ),
        pytest.param(
            {"top_h": 4, "rank_gate": lambda r: RankDropout(r, 0.3), "lora_dropout": 0.1},
            marks=pytest.mark.long,
        ),
        pytest.param({"rank_pattern": {"q_proj": 2}}, marks=pytest.mark.long),
    ],
)
def test_keeps_a_strategys_promises(arguments: Any) -> None:
    check_strategy(IncreLoRA(**EVERY, **arguments))


def test_a_gate_behind_the_singular_values_lets_reserves_through() -> None:
    strategy = IncreLoRA(r=2, target_r=4, rank_gate=lambda r: RankScale(r, 0.7))
    strategy.attach(model := tiny_llama())
    for layer in lora_layers(model).values():
        own, other = layer.gate  # type: ignore[misc]
        assert own.reserve == 2
        torch.testing.assert_close(other.values, torch.tensor([0.7, 0.7, 1.0, 1.0]))
