"""ElaLoRA against full-size matrices, the paper's importance and an Adam that is written out."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_peft.adapters import lora_layers
from lightning_peft.adapters.gates import rank_scale
from lightning_peft.errors import UserError
from lightning_peft.strategies import RankDropout
from lightning_peft.strategies.elalora import ElaLoRA
from lightning_peft.testing import check_strategy
from lightning_peft.testing.loop import STEPS, Run
from lightning_peft.testing.promises import check_resume

sys.path.insert(0, str(Path(__file__).parent))
from masked_triplets import LEARNING_RATE, masked_model  # noqa: E402

TARGETS = ["q_proj", "down_proj"]
SHORT = {"init_warmup": 1, "mask_interval": 2, "final_warmup": 2, "total_step": STEPS}


class Reference:
    """The method by its formulas, for a model of :class:`Triplet`."""

    def __init__(self, strategy: ElaLoRA, make: Any, layers: Any) -> None:
        self.strategy, self.layers = strategy, layers
        self.model, self.triplets = masked_model(make, layers, 16)
        self.S = {n: {k: torch.zeros_like(p) for k, p in t.parts()} for n, t in self.items()}
        self.U = {n: {k: torch.zeros_like(p) for k, p in t.parts()} for n, t in self.items()}

    def items(self) -> Any:
        return self.triplets.items()

    def backward(self, batch: Any) -> float:
        distances = [d for t in self.triplets.values() for d in t.distances()]
        loss = self.model(**batch).loss + 0.1 * torch.stack(distances).mean()
        loss.backward()
        return float(loss.detach())

    @torch.no_grad()
    def step(self, step: int) -> None:
        for _, t in self.items():
            t.step(step, lambda now, born: 1.0)
        for name, t in self.items():
            for key, p in t.parts():
                S, U, now = self.S[name][key], self.U[name][key], (p * p.grad).abs()
                S.mul_(0.85).add_(0.15 * now)
                U.mul_(0.85).add_(0.15 * (now - S).abs())
        self.model.zero_grad()

    def importance(self, name: str) -> list[float]:
        """Of each living slot: that of its Λ, and the means of its column of P and row of Q."""
        product = {key: self.S[name][key] * self.U[name][key] for key in "PEQ"}
        return [
            float(product["E"][slot] + product["P"][:, slot].mean() + product["Q"][slot].mean())
            for slot in self.triplets[name].alive
        ]

    def exchange(self, b: int) -> dict[str, tuple[int, int]]:
        """How many left and came; drawn values are taken from ours, which has acted already."""
        offered = []
        for name, t in self.items():
            own = sorted(zip(self.importance(name), t.alive, strict=True))
            offered += [(s, name, slot) for s, slot in own[: min(self.strategy.k, len(own) - 1)]]
        offered.sort()
        moved = {}
        leaving = {(name, slot) for _, name, slot in offered[:b]}
        for name, t in self.items():
            kept = [slot for slot in t.alive if (name, slot) not in leaving]
            coming = sum(other == name for _, other, _ in offered[len(offered) - b :])
            moved[name] = len(t.alive) - len(kept), coming
            free = [slot for slot in range(16) if slot not in t.alive][:coming]
            for index, slot in enumerate(free, start=len(kept)):
                t.copy(slot, self.layers[name], index)
                for averages in (self.S[name], self.U[name]):
                    for key, average in averages.items():
                        average.select(1 if key == "P" else 0, slot).zero_()
            t.alive = kept + free
        return moved


@pytest.mark.parametrize(("r", "b", "k"), [(3, 4, 2), (4, 3, 1), (2, 2, 4)])
def test_exchange_is_the_papers_with_full_size_matrices(
    tiny_llama: Any, random_batch: Any, r: int, b: int, k: int
) -> None:
    schedule = {"init_warmup": 1, "mask_interval": 3, "final_warmup": 4, "total_step": 24}
    strategy = ElaLoRA(r=r, b=b, k=k, target_modules=TARGETS, max_r=12, **schedule)
    torch.manual_seed(0)
    strategy.attach(ours := tiny_llama())
    layers = lora_layers(ours)
    reference = Reference(strategy, tiny_llama, layers)
    parameters = [p for p in ours.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=LEARNING_RATE)
    events = []
    for step in range(24):
        (loss := ours(**random_batch(step)).loss + strategy.penalty(ours)).backward()
        expected = reference.backward(random_batch(step))
        assert math.isclose(float(loss.detach()), expected, rel_tol=1e-5)
        optimizer.step()
        reference.step(step)
        strategy.after_step(ours, optimizer, step)
        if 1 < step < 20 and (step - 1) % 3 == 0:
            left = round(b * (1 - ((step - 1) / 19) ** 3))
            moved = reference.exchange(left)
            assert sum(out for out, _ in moved.values()) == left
            events.append({name: pair for name, pair in moved.items() if any(pair)})
        optimizer.zero_grad()
        assert_same(layers, reference)
        assert sum(layer.rank for layer in layers.values()) == r * len(layers)
    assert len(events) == 6
    assert sum(out for out, _ in events[0].values()) > sum(out for out, _ in events[-1].values())
    assert any(out != new for event in events for out, new in event.values())
    assert len({layer.rank for layer in layers.values()}) > 1


def assert_same(layers: Any, reference: Reference) -> None:
    for name, layer in layers.items():
        t = reference.triplets[name]
        assert layer.rank == len(t.alive), name
        torch.testing.assert_close(layer.active_A.detach(), t.Q[t.alive], rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(layer.active_B.detach(), t.P[:, t.alive], rtol=1e-3, atol=1e-5)
        values = rank_scale(layer.gate).values.detach()
        torch.testing.assert_close(values, t.E[t.alive], rtol=1e-3, atol=1e-5)


def test_new_vectors_have_length_one_and_stand_beside_the_others() -> None:
    run = Run(lambda: ElaLoRA(r=3, **SHORT))
    run.prepare()
    layers = lora_layers(run.model)
    for layer in layers.values():  # orthonormal ones, which the penalty would lead to
        for matrix in (layer.active_A, layer.active_B.T):
            with torch.no_grad():
                matrix.copy_(torch.linalg.qr(matrix.T)[0].T)
    strategy: Any = run.strategy
    run.train(range(3))
    before = {name: [m.detach().clone() for m in sides(layer)] for name, layer in layers.items()}
    for name, layer in layers.items():
        strategy._add(name, layer, run.optimizer)
        for matrix, old in zip(sides(layer), before[name], strict=True):
            new = matrix.detach()[-1]
            assert torch.equal(matrix.detach()[:-1], old)
            torch.testing.assert_close(new.norm(), torch.tensor(1.0))
            assert (old @ new).abs().max() < 0.3  # three steps have bent the right angles
        assert float(rank_scale(layer.gate).values.detach()[-1]) <= 1e-13


def sides(layer: Any) -> list[Tensor]:
    return [layer.active_A, layer.active_B.T]


def test_decisions_follow_the_ranks_and_the_last_steps_leave_them_alone() -> None:
    run = Run(lambda: ElaLoRA(r=3, b=6, **{**SHORT, "final_warmup": 5}))
    run.prepare()
    run.train(range(STEPS))
    ranks = {name: 3 for name in lora_layers(run.model)}
    for decision in run.strategy.decisions:
        change = decision["rank"] - ranks[decision["layer"]]
        assert 0 < (change if decision["event"] == "added" else -change) <= 2
        ranks[decision["layer"]] = decision["rank"]
    assert ranks == {name: layer.rank for name, layer in lora_layers(run.model).items()}
    assert {d["step"] for d in run.strategy.decisions} == {3, 5}
    assert run.strategy.averages == {}  # type: ignore[attr-defined]


def test_gradients_that_are_not_finite_leave_the_importance_alone() -> None:
    run = Run(lambda: ElaLoRA(r=3, **SHORT))
    run.prepare()
    run.train(range(2))
    averages: Any = run.strategy.averages  # type: ignore[attr-defined]
    before = {n: {k: t.clone() for k, t in parts.items()} for n, parts in averages.items()}
    (run.model(**run.batch(2)).loss * math.inf).backward()
    run.strategy.after_step(run.model, run.optimizer, 3)
    assert not run.strategy.decisions
    assert all(
        torch.equal(t, averages[n][k]) for n, parts in before.items() for k, t in parts.items()
    )


def test_a_run_that_is_killed_at_any_step_ends_bit_for_bit() -> None:
    make = lambda: ElaLoRA(r=3, b=6, **SHORT)  # noqa: E731
    run = Run(make)
    run.prepare()
    torch.manual_seed(2)
    for step in range(STEPS):
        run.train([step])
        run.saved[step + 1] = run.save()
    for after in range(1, STEPS):
        check_resume(make, run, after)


def test_it_says_that_it_needs_the_number_of_steps() -> None:
    run = Run(lambda: ElaLoRA(r=3))
    run.prepare()
    with pytest.raises(UserError) as error:
        run.train([0])
    assert str(error.value) == (
        "total_step: ElaLoRA's schedule depends on the number of optimizer steps; give total_step "
        "where there is no trainer to ask."
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"r": 4, "max_r": 3}, "max_r must be at least r = 4, got 3."),
        ({"b": 0}, "b must be at least 1, got 0."),
        ({"k": 0}, "k must be at least 1, got 0."),
        ({"init_warmup": -1}, "init_warmup must be at least 0, got -1."),
        ({"final_warmup": -1}, "final_warmup must be at least 0, got -1."),
        ({"mask_interval": 0}, "mask_interval must be at least 1, got 0."),
        ({"beta1": 1.0}, "beta1 must lie in (0, 1), got 1.0."),
        ({"beta2": 0.0}, "beta2 must lie in (0, 1), got 0.0."),
        (
            {"total_step": 800},
            "init_warmup + final_warmup must be below total_step = 800, so that ranks can move "
            "between them, got 300 + 500.",
        ),
        (
            {"total_step": 850},
            "mask_interval = 50 and b = 4 let no rank move between init_warmup = 300 and the last "
            "final_warmup = 500 of total_step = 850 steps; lower mask_interval, or raise b.",
        ),
        (
            {"total_step": 852, "b": 1},  # at step 350 b less the cube of the time rounds to 0
            "mask_interval = 50 and b = 1 let no rank move between init_warmup = 300 and the last "
            "final_warmup = 500 of total_step = 852 steps; lower mask_interval, or raise b.",
        ),
    ],
)
def test_numbers_outside_their_range_are_refused(arguments: Any, message: str) -> None:
    with pytest.raises(UserError) as error:
        ElaLoRA(**arguments)
    assert str(error.value) == message


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        pytest.param({"b": 8, "max_r": 3, "final_warmup": 0}, marks=pytest.mark.long),
        pytest.param({"rank_gate": lambda r: RankDropout(r, 0.3)}, marks=pytest.mark.long),
        pytest.param({"rank_pattern": {"q_proj": 1}}, marks=pytest.mark.long),
    ],
)
def test_keeps_a_strategys_promises(arguments: Any) -> None:
    check_strategy(ElaLoRA(r=3, **{**SHORT, **arguments}))
