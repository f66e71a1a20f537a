"""What a base may lose is said when a method is attached; what has left is remembered."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_peft import save_peft, trainable_parameters
from lightning_peft.adapters.groups import groups_of
from lightning_peft.adapters.peft_format import without_peft
from lightning_peft.callbacks.take_away import take_away
from lightning_peft.errors import UserError
from lightning_peft.strategies.pruned_base import PrunedBase
from lightning_peft.testing import check_strategy


class FirstStay(PrunedBase):
    """The first groups are worth most."""

    def before_step(self, model: nn.Module, optimizer: Optimizer, global_step: int) -> None:
        worth = {name: -torch.arange(len(kept)).float() for name, kept in self.kept.items()}
        self.remove(model, optimizer, global_step, worth)


class LastStay(FirstStay):
    """A method of one's own in a line: what groups are worth."""

    def remove(self, model: Any, optimizer: Any, step: int, importance: Any) -> dict[str, Tensor]:
        worth = {name: -value for name, value in importance.items()}
        return super().remove(model, optimizer, step, worth)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"ratio": 1.0}, "ratio must lie in [0, 1), got 1.0."),
        ({"ratio": -0.1}, "ratio must lie in [0, 1), got -0.1."),
        ({"head_ratio": 1.5}, "head_ratio must lie in [0, 1), got 1.5."),
        ({"start_step": -1}, "start_step must be at least 0, got -1."),
        ({"prune_every": 0}, "prune_every must be at least 1, got 0."),
        ({"removals": 0}, "removals must be at least 1, got 0."),
    ],
)
def test_numbers_outside_their_range_are_refused(arguments, sentence) -> None:
    with pytest.raises(UserError) as error:
        PrunedBase(**arguments)
    assert str(error.value) == sentence


@pytest.mark.parametrize(
    ("arguments", "shape", "sentence"),
    [
        (
            {"ratio": 0.4},
            {"hidden_size": 48, "num_attention_heads": 8, "num_key_value_heads": 8},
            "ratio = 0.4 leaves 5 of 8 key/value heads, which LlamaConfig refuses (The hidden size "
            "(48) is not a multiple of the number of attention heads (5)); give head_ratio one of "
            "0, 0.25, 0.5, 0.625, 0.75, 0.875.",
        ),
        (
            {"head_ratio": 0.34},
            {"hidden_size": 48, "num_attention_heads": 12, "num_key_value_heads": 6},
            None,
        ),
        (
            {"head_ratio": 0.2},
            {"hidden_size": 48, "num_attention_heads": 12, "num_key_value_heads": 6},
            "head_ratio = 0.2 leaves 5 of 6 key/value heads, which LlamaConfig refuses (The hidden "
            "size (48) is not a multiple of the number of attention heads (10)); give head_ratio "
            "one of 0, 0.3334, 0.5, 0.6667, 0.8334.",
        ),
        (
            {"ratio": 0.02},
            {},
            "ratio = 0.02 takes none of a layer's 48 channels, and head_ratio = None none of its 2 "
            "key/value heads; give a larger one.",
        ),
    ],
)
def test_what_cannot_be_saved_or_is_nothing_is_refused_when_attached(
    tiny_llama, arguments, shape, sentence
) -> None:
    model, strategy = tiny_llama(**shape), FirstStay(**arguments)
    if sentence is None:
        strategy.attach(model)
        return
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(UserError) as error:
        strategy.attach(model)
    assert str(error.value) == sentence
    assert [name for name, _ in model.named_modules()] == names


def test_every_ratio_that_is_named_fits(tiny_llama) -> None:
    shape = {"hidden_size": 60, "num_attention_heads": 30, "num_key_value_heads": 30}
    with pytest.raises(UserError) as error:
        FirstStay(head_ratio=0.1).attach(tiny_llama(**shape, head_dim=2))
    named = str(error.value).split("one of ")[1].rstrip(".").split(", ")
    left = []
    for ratio in named:
        strategy = FirstStay(head_ratio=float(ratio))
        strategy.attach(tiny_llama(**shape, head_dim=2))
        name = "model.layers.0.self_attn"
        left.append(strategy.excess().get(name, 30))
    assert left == [30, 20, 15, 12, 10, 6, 5, 4, 3, 2, 1]


def test_groups_leave_at_the_steps_of_the_schedule(tiny_llama, random_batch) -> None:
    strategy = FirstStay(r=2, ratio=0.5, start_step=1, prune_every=2, removals=3)
    strategy.attach(model := tiny_llama())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    seen = []
    for step in range(8):
        model(**random_batch(step)).loss.backward()
        strategy.before_step(model, optimizer, step)
        optimizer.step()
        optimizer.zero_grad()
        seen.append((model.config.num_key_value_heads, model.config.intermediate_size))
    assert seen == [(2, 48), (2, 32), (2, 32), (2, 25), (2, 25), (1, 24), (1, 24), (1, 24)]
    assert all(torch.equal(k, torch.arange(len(k))) for k in strategy.kept.values())
    mlp, attention = [f"model.layers.{i}.mlp" for i in (0, 1)], "model.layers.0.self_attn"
    assert len(strategy.kept[mlp[0]]) == 24
    noted = [(d["step"], d["layer"]) for d in strategy.decisions if "layers.0" in d["layer"]]
    linears = [f"{mlp[0]}.{leaf}" for leaf in ("gate_proj", "up_proj", "down_proj")]
    heads = [f"{attention}.{leaf}" for leaf in ("q_proj", "k_proj", "v_proj", "o_proj")]
    assert noted == [*((s, n) for s in (1, 3) for n in linears), *((5, n) for n in heads + linears)]
    assert {d["rank"] for d in strategy.decisions} == {2}


def test_the_count_at_the_end_is_told_at_the_start(tiny_llama, random_batch) -> None:
    make = lambda: FirstStay(r=3, ratio=0.4, head_ratio=0.5, start_step=0, removals=1)  # noqa: E731
    with torch.device("meta"):
        meta = tiny_llama()
    planned, trained = make(), make()
    planned.attach(meta)
    trained.attach(model := tiny_llama())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    model(**random_batch(0)).loss.backward()
    before = trainable_parameters(model)
    trained.before_step(model, optimizer, 0)
    optimizer.step()
    assert planned.final_parameters(meta) == trainable_parameters(model) < before


def test_an_adapter_over_a_pruned_base_is_none_of_pefts(tiny_llama, tmp_path) -> None:
    strategy = FirstStay(r=2, start_step=0, removals=1)
    strategy.attach(model := tiny_llama())
    assert without_peft(model) is None
    strategy.restructure(model, strategy.state_dict())  # of before the first removal
    assert without_peft(model) is None
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    strategy.before_step(model, optimizer, 0)
    optimizer.step()
    reason = "PEFT needs a stored base of the same sizes, and this one was pruned"
    assert without_peft(model) == reason
    assert take_away(model, tmp_path) == (
        f"nothing: {reason}; lightning-peft export --merge writes the merged model"
    )
    with pytest.raises(UserError) as error:
        save_peft(model, tmp_path)
    assert str(error.value) == (
        f"{reason}, so there is no adapter in its format; merge it instead (lightning_peft.merge, "
        "lightning-peft export --merge)."
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("steps", [120, 121])
def test_a_run_that_is_too_short_is_told(tiny_llama, steps) -> None:
    strategy = FirstStay(start_step=100, prune_every=5, removals=5)
    strategy.attach(tiny_llama())
    trainer: Any = SimpleNamespace(global_step=0, estimated_stepping_batches=steps)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        strategy.on_train_start(trainer, None)  # type: ignore[arg-type]
    sentence = (
        "FirstStay makes its last removal at step 120, but this run has 120 steps and ends with a "
        "larger base: lower start_step, prune_every or removals."
    )
    assert [str(warning.message) for warning in told] == [sentence] * (steps == 120)


def test_several_processes_are_refused(tiny_llama, monkeypatch) -> None:
    monkeypatch.setattr("lightning_peft.distributed.is_distributed", lambda: True)
    with pytest.raises(UserError) as error:
        FirstStay().attach(tiny_llama())
    assert str(error.value) == (
        "FirstStay changes the sizes of weights, which several processes hold in buckets or "
        "shares; run it on one device."
    )


def test_a_method_of_ones_own_keeps_the_promises() -> None:
    check_strategy(LastStay(r=4, start_step=1, prune_every=3, removals=3))


def test_what_is_left_is_known_by_the_original_base(tiny_llama) -> None:
    strategy = LastStay(r=2, head_ratio=0.0, start_step=0, prune_every=1, removals=2)
    strategy.attach(model := tiny_llama())
    up = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for step in range(2):
        strategy.before_step(model, optimizer, step)
        optimizer.step()
    kept = strategy.kept["model.layers.0.mlp"]
    assert kept.tolist() == list(range(24, 48))
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, up[kept])
    assert [len(k) for k in strategy.kept.values()] == [2, 2, 24, 24]
    assert [each.count for each in groups_of(model).values()] == [2, 2, 24, 24]
    assert [each.count for each in strategy.groups.values()] == [2, 2, 48, 48]
