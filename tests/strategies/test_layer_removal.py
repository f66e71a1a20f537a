"""Layers leave in the order of mean ‖ΔW x‖² by brute force, shared over what training has seen."""

from __future__ import annotations

import math
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lightning_peft import trainable_parameters
from lightning_peft.adapters import adapter_layers
from lightning_peft.strategies import RankDropout
from lightning_peft.strategies.layer_removal import LayerRemoval
from lightning_peft.testing import check_strategy

TARGETS = ["q_proj", "v_proj", "up_proj"]


class BruteForce:
    """Whole matrices ΔW on the inputs that each layer had in training, kept by layer."""

    def __init__(self, model: Any) -> None:
        self.layers = adapter_layers(model)
        self.seen: dict[str, list[torch.Tensor]] = {name: [] for name in self.layers}
        for name, layer in self.layers.items():
            layer.register_forward_pre_hook(self.look(name))

    def look(self, name: str) -> Any:
        def hook(layer: Any, args: tuple[torch.Tensor]) -> None:
            if layer.training:
                x = args[0].detach()[self.mask]
                self.seen[name] += list((x @ layer.delta_weight().T).square().sum(-1))

        return hook

    def lowest(self, count: int) -> set[str]:
        living = [name for name, layer in self.layers.items() if layer.rank]
        means = {name: sum(self.seen[name]).item() / len(self.seen[name]) for name in living}
        kinds = {name: name.rsplit(".", 1)[1] for name in living}
        shares = {
            name: means[name] / sum(means[n] for n in living if kinds[n] == kinds[name])
            for name in living
        }
        self.seen = {name: [] for name in self.layers}
        return set(sorted(living, key=lambda name: shares[name])[:count])


@pytest.mark.parametrize("gate", [None, lambda r: RankDropout(r, 0.3)])
def test_the_layers_with_the_least_share_leave(tiny_llama, random_batch, gate) -> None:
    strategy = LayerRemoval(r=3, keep=0.4, every=3, count=2, target_modules=TARGETS, rank_gate=gate)
    torch.manual_seed(0)
    strategy.attach(model := tiny_llama())
    reference = BruteForce(model)
    layers = adapter_layers(model)
    assert len(layers) == 6
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    model.train()
    expected = {0: set[str]()}
    for step in range(10):
        batch = random_batch(step)
        reference.mask = batch["attention_mask"].bool()
        model.eval()
        model(**random_batch(100 + step))  # what validation sees does not count
        model.train()
        model(**batch).loss.backward()
        if step in (3, 6):
            # Three are to stay of six: 0.4 of them, rounded up.
            expected[step] = reference.lowest(2 if step == 3 else 1)
        strategy.before_step(model, optimizer, step)
        optimizer.step()
        optimizer.zero_grad()
    found = {
        step: {d["layer"] for d in strategy.decisions if d["step"] == step} for step in expected
    }
    assert found == expected
    gone = expected[3] | expected[6]
    assert {name for name, layer in layers.items() if layer.rank == 0} == gone
    assert len(gone) == 3
    assert all(d["event"] == "removed" and d["rank"] == 0 for d in strategy.decisions)
    assert not strategy.sums
    for name in gone:
        assert torch.equal(layers[name].delta_weight(), torch.zeros_like(layers[name].base.weight))
    left = [layer for name, layer in layers.items() if name not in gone]
    count = sum(3 * (layer.in_features + layer.out_features) for layer in left)
    assert trainable_parameters(model) == count


def test_a_kinds_last_layer_goes_after_all_others(tiny_llama, random_batch) -> None:
    strategy = LayerRemoval(r=2, keep=0.5, every=1, count=1, target_modules=TARGETS)
    strategy.attach(model := tiny_llama())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    model.train()
    for step in range(6):
        model(**random_batch(step)).loss.backward()
        strategy.before_step(model, optimizer, step)
        optimizer.step()
        optimizer.zero_grad()
    left = [name for name, layer in adapter_layers(model).items() if layer.rank]
    assert sorted(name.rsplit(".", 1)[1] for name in left) == sorted(TARGETS)


def test_nothing_leaves_by_what_is_not_finite(tiny_llama, random_batch) -> None:
    strategy = LayerRemoval(r=2, every=1, target_modules=TARGETS)
    strategy.attach(model := tiny_llama())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    model.train()
    model(**random_batch(0)).loss.backward()
    name = next(iter(adapter_layers(model)))
    strategy.sums[name]["squares"].fill_(math.inf)
    with pytest.warns(UserWarning, match="no layers were removed at step 1, since what they add"):
        strategy.before_step(model, optimizer, 1)
    assert all(layer.rank for layer in adapter_layers(model).values())
    assert not strategy.sums


@pytest.mark.parametrize(("begin", "last"), [(0, 30), (10, 30), (11, 40)])
def test_a_run_that_is_too_short_is_told(tiny_llama, begin, last) -> None:
    for steps, warns in ((last, True), (last + 1, False)):
        strategy = LayerRemoval(r=2, every=10, target_modules=TARGETS)
        strategy.attach(tiny_llama())
        trainer: Any = SimpleNamespace(global_step=begin, estimated_stepping_batches=steps)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            strategy.on_train_start(trainer, None)  # type: ignore[arg-type]
        sentence = (
            f"LayerRemoval leaves 3 of 6 layers at step {last}, but this run has {steps} steps and "
            "ends with more: lower every, or raise count."
        )
        assert [str(warning.message) for warning in told] == [sentence] * warns


def test_the_part_that_stays_is_rounded_up_but_for_rounding_errors() -> None:
    layers: Any = {str(index): SimpleNamespace(rank=1) for index in range(10)}
    found = [LayerRemoval(keep=keep)._target(layers) for keep in (0.01, 0.3, 0.31, 0.7, 1.0)]
    assert found == [1, 3, 4, 7, 10]
    assert LayerRemoval().final_parameters(torch.nn.Linear(1, 1)) is None


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"keep": 0.0}, "keep must lie in (0, 1], got 0.0."),
        ({"keep": 1.5}, "keep must lie in (0, 1], got 1.5."),
        ({"every": 0}, "every must be at least 1, got 0."),
        ({"count": 0}, "count must be at least 1, got 0."),
    ],
)
def test_numbers_outside_their_range_are_refused(arguments, sentence) -> None:
    with pytest.raises(ValueError, match="must") as error:
        LayerRemoval(**arguments)
    assert str(error.value) == sentence


@pytest.mark.parametrize(
    "arguments",
    [
        {"every": 5, "count": 3},
        pytest.param({"every": 2, "keep": 0.2, "count": 4}, marks=pytest.mark.long),
        pytest.param(
            {
                "every": 4,
                "count": 4,
                "lora_dropout": 0.1,
                "rank_gate": lambda r: RankDropout(r, 0.3),
            },
            marks=pytest.mark.long,
        ),
    ],
)
def test_keeps_a_strategys_promises(arguments) -> None:
    check_strategy(LayerRemoval(r=4, **arguments))


@pytest.mark.slow
def test_two_processes_agree() -> None:
    check_strategy(LayerRemoval(r=4, every=3, count=2), processes=2)
