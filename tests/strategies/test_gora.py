"""GoRA: importance, ranks and start by the formulas, on gradients by autograd."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_peft.adapters import adapter_layers
from lightning_peft.errors import UserError
from lightning_peft.strategies import RankDropout
from lightning_peft.strategies.gora import GoRA, gradient_fit
from lightning_peft.testing import check_strategy

TARGETS = ["q_proj", "v_proj", "down_proj"]


def prepared(strategy: GoRA, model: Any, batches: list[Any]) -> Any:
    torch.manual_seed(0)
    strategy.attach(model)
    strategy.prepare(model, lambda share: batches, lambda batch: model(**batch).loss)
    return model


def mean_gradients(model: Any, names: Any, batches: list[Any]) -> list[Tensor]:
    weights = [model.get_submodule(name).weight for name in names]
    loss = sum(model(**batch).loss for batch in batches) / len(batches)
    return list(torch.autograd.grad(loss, weights))


def test_ranks_are_those_of_the_formula(tiny_llama, random_batch) -> None:
    batches = [random_batch(0), random_batch(1, rows=3)]
    model = prepared(GoRA(r=8, target_modules=TARGETS), tiny_llama(), batches)
    layers, bare = adapter_layers(model), tiny_llama()
    sizes = {n: math.sqrt(m.in_features + m.out_features) for n, m in layers.items()}
    gradients = mean_gradients(bare, layers, batches)
    importance = {
        name: float((bare.get_submodule(name).weight.detach() * gradient).abs().mean())
        for name, gradient in zip(layers, gradients, strict=True)
    }
    budget = 8 * sum(sizes.values())
    expected = {}
    for name, value in importance.items():
        paid = round(budget * value / sum(importance.values()))
        expected[name] = min(max(int(paid // sizes[name]), 4), 32)
    assert {name: layer.rank for name, layer in layers.items()} == expected
    assert len(set(expected.values())) > 2


def test_b_starts_at_the_fit_of_the_gradient_by_a(tiny_llama, random_batch) -> None:
    batches = [random_batch(0), random_batch(1)]
    strategy = GoRA(r=4, gamma=0.07, lora_alpha=6, target_modules=TARGETS)
    model = prepared(strategy, tiny_llama(), batches)
    layers = adapter_layers(model)
    gradients = mean_gradients(tiny_llama(), layers, batches)
    for layer, gradient in zip(layers.values(), gradients, strict=True):
        r, d = layer.lora_A.shape
        assert layer.scaling == 6 / math.sqrt(r)
        fit = torch.linalg.lstsq(layer.lora_A.detach().T, gradient.T).solution.T
        expected = -0.07 * math.sqrt(d / r) / layer.scaling * fit
        assert (layer.lora_B - expected).norm() < 1e-4 * expected.norm()


def test_the_first_step_is_about_gamma_times_the_gradient() -> None:
    torch.manual_seed(0)
    gradient, base = torch.randn(300, 200), nn.Linear(200, 300)
    strategy = GoRA(r=16, gamma=0.05)
    layer: Any = strategy.layer(base, "q")
    strategy.start(layer, gradient)
    change = layer.delta_weight()
    assert float(change.norm()) == pytest.approx(0.05 * float(gradient.norm()), rel=0.05)
    assert (change * gradient).sum() < 0


def test_it_begins_with_a_lower_loss_on_the_sample(tiny_llama, random_batch) -> None:
    batch = random_batch(0)
    model = prepared(GoRA(r=4, gamma=0.2), tiny_llama(), [batch])
    assert model(**batch).loss < tiny_llama()(**batch).loss


def test_a_fit_of_more_rows_than_inputs_is_exact() -> None:
    torch.manual_seed(0)
    gradient, A = torch.randn(5, 3).double(), torch.randn(6, 3).double()
    torch.testing.assert_close(gradient_fit(gradient, A) @ A, gradient)


def test_a_budget_is_spread_like_that_many_components(tiny_llama, random_batch) -> None:
    one, two = (
        prepared(GoRA(r=r, min_r=1, max_r=99, **more), tiny_llama(), [random_batch(0)])
        for r, more in ((8, {}), (4, {"budget": 8 * 14}))
    )
    ranks = [[layer.rank for layer in adapter_layers(model).values()] for model in (one, two)]
    assert ranks[0] == ranks[1]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"gamma": -0.1}, "gamma must be a finite number of at least 0, got -0.1."),
        ({"gamma": math.inf}, "gamma must be a finite number of at least 0, got inf."),
        ({"r": 4, "min_r": 5}, "min_r must lie between 0 and r = 4, got 5."),
    ],
)
def test_numbers_outside_their_range_are_refused(arguments, sentence) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(sentence)}$"):
        GoRA(**arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        pytest.param(
            {"min_r": 0, "lora_dropout": 0.2, "rank_gate": lambda r: RankDropout(r, 0.3)},
            marks=pytest.mark.long,
        ),
    ],
)
def test_keeps_a_strategys_promises(arguments) -> None:
    # So small a step that the model equals its base to rounding, as it is to begin.
    check_strategy(GoRA(r=4, gamma=1e-6, **arguments))


def test_keeps_the_promises_of_a_strategy_that_does_not_begin_at_its_base() -> None:
    check_strategy(GoRA(r=4))


def test_two_processes_come_to_one_allotment() -> None:
    check_strategy(GoRA(r=4), processes=2)
