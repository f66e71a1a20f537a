"""Importance of the components of P Λ Q by AdaLoRA's formulas, written out."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lightning_peft.adapters import LoRALinear, lora_layers
from lightning_peft.adapters.gates import RankScale
from lightning_peft.strategies import AdaLoRA
from lightning_peft.strategies.triplets import TripletImportance, orthogonality_penalty
from lightning_peft.testing.loop import Run


def layer_with_gradients(seed: int) -> LoRALinear:
    torch.manual_seed(seed)
    layer = LoRALinear(nn.Linear(5, 4), 3, 6.0, gate=RankScale(3, 0.5))
    for parameter in layer.own_parameters():
        parameter.data.normal_()
        parameter.grad = torch.randn_like(parameter)
    return layer


def written_out(layers: list[LoRALinear], beta1: float, beta2: float) -> list[float]:
    """Equations 7 to 9, one value at a time."""
    smoothed: dict[tuple[str, int, int], list[float]] = {}
    for layer in layers:
        gate = layer.gate.values[:, None]  # type: ignore[union-attr, index]
        grad = layer.gate.values.grad[:, None]  # type: ignore[union-attr, index]
        for key, w, g in (
            ("values", gate, grad),
            ("P", layer.lora_B.T, layer.lora_B.grad.T),  # type: ignore[union-attr]
            ("Q", layer.lora_A, layer.lora_A.grad),
        ):
            for j in range(w.shape[0]):
                for i in range(w.shape[1]):
                    now = abs(float(w[j, i]) * float(g[j, i]))
                    average, uncertainty = smoothed.get((key, j, i), [0.0, 0.0])
                    average = beta1 * average + (1 - beta1) * now
                    uncertainty = beta2 * uncertainty + (1 - beta2) * abs(now - average)
                    smoothed[key, j, i] = [average, uncertainty]
    totals = []
    for j in range(3):
        part = {
            key: [a * u for (k, row, _), (a, u) in smoothed.items() if (k, row) == (key, j)]
            for key in ("values", "P", "Q")
        }
        totals.append(sum(sum(values) / len(values) for values in part.values()))
    return totals


def test_scores_are_those_of_the_paper() -> None:
    layers = [layer_with_gradients(seed) for seed in range(4)]
    importance = TripletImportance(0.85, 0.7)
    for layer in layers:
        assert importance.update({"x": layer}).item()
    expected = torch.tensor(written_out(layers, 0.85, 0.7))
    torch.testing.assert_close(importance.score("x"), expected)


def test_it_follows_components_that_leave_and_come() -> None:
    importance = TripletImportance(0.85, 0.7)
    importance.update({"x": layer_with_gradients(0)})
    before = importance.score("x")
    importance.keep("x", torch.tensor([0, 2]))
    importance.add("x")
    assert torch.equal(importance.score("x"), torch.stack([before[0], before[2], torch.zeros(())]))
    assert importance["x"]["P.average"].shape == (4, 3)
    other = TripletImportance(0.85, 0.7)
    other.restore(importance.state())
    assert torch.equal(other.score("x"), importance.score("x"))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(bad: float) -> None:
    importance, layer = TripletImportance(0.85, 0.7), layer_with_gradients(0)
    importance.update({"x": layer})
    before = importance.score("x")
    layer.lora_A.grad[0, 0] = bad  # type: ignore[index]
    assert not importance.update({"x": layer}).item()
    assert torch.equal(importance.score("x"), before)


def test_adalora_goes_on_after_a_step_that_overflowed() -> None:
    run = Run(lambda: AdaLoRA(r=4, target_r=2, total_step=12, tfinal=3))
    run.prepare()
    run.train(range(4))
    (run.model(**run.batch(4)).loss * math.inf).backward()
    run.strategy.after_step(run.model, run.optimizer, 4)
    run.optimizer.zero_grad()
    run.train(range(5, 12))
    ranks = [layer.rank for layer in lora_layers(run.model).values()]
    assert sum(ranks) == 2 * len(ranks)


def test_the_penalty_is_zero_for_orthonormal_vectors_and_their_distance_else() -> None:
    layer = layer_with_gradients(0)
    with torch.no_grad():
        layer.lora_A.copy_(torch.eye(3, 5))
        layer.lora_B.copy_(torch.eye(4, 3))
    assert orthogonality_penalty(layer) == 0
    with torch.no_grad():
        layer.lora_A[0, 0] = 2.0  # its Gram matrix is off by 3 in one place
    torch.testing.assert_close(orthogonality_penalty(layer), torch.tensor(1.5))
