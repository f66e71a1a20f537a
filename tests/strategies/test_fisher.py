"""FisherLoRA: importance by autograd on the bare base, ranks, and the promises."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from lightning_peft import trainable_parameters
from lightning_peft.adapters import adapter_layers
from lightning_peft.errors import UserError
from lightning_peft.strategies import RankDropout
from lightning_peft.strategies.fisher import FisherLoRA
from lightning_peft.testing import check_strategy

TARGETS = ["q_proj", "v_proj", "down_proj"]


def prepared(strategy: FisherLoRA, model: Any, batches: list[Any]) -> Any:
    torch.manual_seed(0)
    strategy.attach(model)
    strategy.prepare(model, lambda share: batches, lambda batch: model(**batch).loss)
    return model


def importance(model: Any, names: Any, batches: list[Any]) -> list[float]:
    """Mean squared gradient of each weight of a bare model, over its values and batches."""
    weights = [model.get_submodule(name).weight for name in names]
    squares = [torch.zeros_like(weight) for weight in weights]
    for batch in batches:
        for square, grad in zip(
            squares, torch.autograd.grad(model(**batch).loss, weights), strict=True
        ):
            square += grad**2 / len(batches)
    return [float(square.mean()) for square in squares]


def test_importance_is_the_mean_squared_gradient(tiny_llama, random_batch) -> None:
    batches = [random_batch(0), random_batch(1, rows=3)]
    model, strategy = tiny_llama(), FisherLoRA(r=4, target_modules=TARGETS)
    strategy.attach(model)
    strategy.seen = 2
    found = strategy.look(model, iter(batches), lambda batch: model(**batch).loss)
    expected = importance(tiny_llama(), found, batches)
    assert list(found) == list(adapter_layers(model))
    assert list(found.values()) == pytest.approx(expected, rel=1e-5)


def test_ranks_follow_the_importance_under_the_budget(tiny_llama, random_batch) -> None:
    batches = [random_batch(0), random_batch(1)]
    strategy = FisherLoRA(r=8, max_r=1000, target_modules=TARGETS)
    model = prepared(strategy, tiny_llama(), batches)
    ranks = [layer.rank for layer in adapter_layers(model).values()]
    values = importance(tiny_llama(), adapter_layers(model), batches)
    assert sum(ranks) == 8 * len(ranks)
    assert len(set(ranks)) > 2
    for rank, value in zip(ranks, values, strict=True):
        assert abs(rank - 8 * len(ranks) * value / sum(values)) < 1
    sizes = [m.in_features + m.out_features for m in adapter_layers(model).values()]
    expected = sum(rank * size for rank, size in zip(ranks, sizes, strict=True))
    assert trainable_parameters(model) == expected


@pytest.mark.parametrize(
    ("arguments", "total", "least", "most"),
    [
        ({}, 24, 1, 8),
        ({"min_r": 3, "max_r": 5}, 24, 3, 5),
        ({"budget": 13}, 13, 1, 8),
        ({"rank_pattern": {"v_proj": 6}}, 28, 1, 8),
    ],
)
def test_the_budget_is_spent_within_the_bounds(
    arguments, total, least, most, tiny_llama, random_batch
) -> None:
    strategy = FisherLoRA(r=4, target_modules=TARGETS, **arguments)
    model = prepared(strategy, tiny_llama(), [random_batch(0)])
    ranks = [layer.rank for layer in adapter_layers(model).values()]
    assert sum(ranks) == total
    assert least <= min(ranks) < max(ranks) <= most
    for layer in adapter_layers(model).values():
        assert layer.scaling == 8 / layer.rank


def test_a_gradient_that_is_no_number_is_refused(tiny_llama, random_batch) -> None:
    strategy, model = FisherLoRA(r=4, target_modules=TARGETS), tiny_llama()
    strategy.attach(model)
    sentence = (
        "importance[0] is nan, and must be finite and at least 0; the loss of the sample has "
        "probably no finite gradient."
    )
    with pytest.raises(UserError, match=f"^{re.escape(sentence)}$"):
        strategy.prepare(
            model,
            lambda share: [random_batch(0)],
            lambda batch: model(**batch).loss * float("nan"),
        )


def test_at_most_eight_batches_are_looked_at(tiny_llama, random_batch) -> None:
    strategy = FisherLoRA(r=2, target_modules=TARGETS)
    prepared(strategy, tiny_llama(), [random_batch(i) for i in range(10)])
    assert strategy.seen == 8


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        pytest.param(
            {"target_modules": TARGETS, "modules_to_save": ["lm_head"]}, marks=pytest.mark.long
        ),
        pytest.param(
            {"min_r": 0, "lora_dropout": 0.2, "rank_gate": lambda r: RankDropout(r, 0.3)},
            marks=pytest.mark.long,
        ),
    ],
)
def test_keeps_a_strategys_promises(arguments) -> None:
    check_strategy(FisherLoRA(r=4, **arguments))


def test_two_processes_come_to_one_allotment() -> None:
    check_strategy(FisherLoRA(r=4), processes=2)
