"""What a budget over all layers leaves at the end is known before, where layers have one size."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_peft.adapters import lora_layers, trainable_parameters
from lightning_peft.strategies import AdaLoRA, DynamicRankDoRA, IncreLoRA, PrunedLoRA
from lightning_peft.testing.loop import STEPS, Run

ALIKE = ["q_proj", "o_proj"]  # four linears of one size
FALLING: list[tuple[Any, dict[str, Any]]] = [
    (AdaLoRA, {"total_step": STEPS, "deltaT": 2}),
    (DynamicRankDoRA, {"total_step": STEPS, "prune_every": 2}),
    (PrunedLoRA, {"allocation": "global", "prune_every": 2}),
]
GROWING: list[tuple[Any, dict[str, Any]]] = [
    (IncreLoRA, {"init_warmup": 0, "incre_interval": 1, "incre_rank_num": 3, "max_r": 6})
]


@pytest.mark.parametrize(("kind", "arguments"), FALLING)
@pytest.mark.parametrize(
    ("ranks", "pattern", "total"),
    [
        ((5, 3), {}, 12),
        ((5, 3), {"layers.0.self_attn.q_proj": 1}, 12),  # of 16; the others keep more
        ((5, 3), {"q_proj": 1}, 12),
        ((5, 4), {"q_proj": 1}, 12),  # fewer from the start than the budget
        ((4, 2), {"o_proj": 6}, 8),
    ],
)
def test_falling_ranks(kind: Any, arguments: Any, ranks: Any, pattern: Any, total: int) -> None:
    r, target_r = ranks
    check(lambda: make(kind, r, target_r, pattern, arguments), total)


@pytest.mark.parametrize(("kind", "arguments"), GROWING)
@pytest.mark.parametrize(("pattern", "total"), [({}, 12), ({"o_proj": 4}, 12), ({"o_proj": 6}, 14)])
def test_growing_ranks(kind: Any, arguments: Any, pattern: Any, total: int) -> None:
    check(lambda: make(kind, 1, 3, pattern, arguments), total)


def make(kind: Any, r: int, target_r: int, pattern: Any, arguments: Any) -> Any:
    return kind(r=r, target_r=target_r, target_modules=ALIKE, rank_pattern=pattern, **arguments)


def check(strategy: Any, total: int) -> None:
    run = Run(strategy)
    run.prepare()
    run.train(range(STEPS))
    assert sum(layer.rank for layer in lora_layers(run.model).values()) == total
    for initialize in (True, False):
        thrown_away = Run(strategy, initialize=initialize)
        found = thrown_away.strategy.final_parameters(thrown_away.model)
        assert found == trainable_parameters(run.model)
