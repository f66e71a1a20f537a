"""The plain loop in which promises are checked."""

from __future__ import annotations

import io

import pytest
import torch
from torch import nn

from lightning_peft.adapters import adapter_layers
from lightning_peft.strategies import LoRA
from lightning_peft.testing import random_batch
from lightning_peft.testing.loop import LEARNING_RATE, Run, distance, logits_of


def make() -> LoRA:
    return LoRA(r=2, target_modules=["q_proj"])


def test_a_run_is_adamw_on_one_batch_a_step() -> None:
    run, twin = Run(make), Run(make)
    run.prepare()
    run.train(range(3))
    optimizer = torch.optim.AdamW(twin.trained().values(), lr=LEARNING_RATE)
    for step in range(3):
        twin.model(**random_batch(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = run.trained()
    assert trained.keys() == {
        f"{name}.lora_{side}" for name in adapter_layers(run.model) for side in "AB"
    }
    assert all(torch.equal(trained[name], p) for name, p in twin.trained().items())


def test_a_save_is_what_the_run_was_then() -> None:
    run = Run(make)
    run.prepare()
    run.train(range(2))
    saved, expected = run.save(), {n: p.detach().clone() for n, p in run.trained().items()}
    run.train(range(2, 4))
    state = torch.load(io.BytesIO(saved), weights_only=True)
    assert all(torch.equal(state["adapter"][name], value) for name, value in expected.items())
    assert state["strategy"] == {"decisions": []}
    assert {int(entry["step"]) for entry in state["optimizer"]["state"].values()} == {2}


def test_logits_are_of_eval_and_attended_tokens_and_keep_the_mode() -> None:
    run = Run(lambda: LoRA(r=2, lora_dropout=0.5))
    nn.init.normal_(next(iter(adapter_layers(run.model).values())).lora_B)
    logits = run.logits()
    assert logits.shape == (int(random_batch(2000)["attention_mask"].sum()), 61)
    assert torch.equal(logits, logits_of(run.model))
    assert run.model.training


def test_a_distance_is_relative_to_the_largest_value() -> None:
    one, other = torch.tensor([1.0, -3.0]), torch.tensor([1.0, -4.0])
    assert distance(one, other) == 0.25
    assert distance(one, one) == 0


def test_state_of_another_shape_than_its_parameter_is_named() -> None:
    run = Run(make)
    run.prepare()
    run.train([0])
    name, parameter = next(iter(run.trained().items()))
    run.optimizer.state[parameter]["exp_avg"] = torch.ones(3, 32)
    sentence = rf"LoRA: now exp_avg of {name} has shape \(3, 32\), the parameter \(2, 32\)"
    with pytest.raises(AssertionError, match=sentence):
        run.assert_shapes("now")
