"""What of an adapted model is saved, and which checkpoints fit it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lightning_peft.adapters import adapter_layers, adapter_state_dict
from lightning_peft.modules.checkpoint import (
    checkpoint_of,
    optimizer_states,
    restore_loader,
    restore_structure,
    strategy_state,
    widen_optimizer_states,
)
from lightning_peft.strategies import DropLoRA, LoRA, PrunedLoRA
from lightning_peft.testing import tiny_llama


def attached(adapter: Any, **shape: Any) -> Any:
    model = tiny_llama(**shape)
    adapter.attach(model)
    return model


def saved_of(adapter: Any, model: Any) -> dict[str, Any]:
    return checkpoint_of(model, adapter, "model.", adapter.state_dict())


def test_adapters_are_saved_and_the_base_is_not() -> None:
    adapter = LoRA(r=2, modules_to_save=["lm_head"])
    model = attached(adapter)
    saved = saved_of(adapter, model)
    assert saved["state_dict"].keys() == {f"model.{name}" for name in adapter_state_dict(model)}
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert saved["state_dict"].keys() == {f"model.{name}" for name in names}
    assert saved["adapter"]["arguments"] == {
        "r": 2,
        "lora_alpha": 4,
        "use_rslora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "modules_to_save": ["lm_head"],
    }
    assert saved["adapter"]["layers"] == list(adapter_layers(model))


def test_lightnings_copy_of_the_strategys_state_is_taken_out() -> None:
    adapter = LoRA()
    checkpoint = {"callbacks": {adapter.state_key: {"decisions": [1]}, "other": {}}}
    assert strategy_state(adapter, checkpoint) == {"decisions": [1]}
    assert checkpoint["callbacks"] == {"other": {}}
    assert strategy_state(adapter, {}) == {"decisions": []}


def test_ranks_are_those_of_the_checkpoint() -> None:
    adapter = PrunedLoRA(r=4, target_r=2)
    model = attached(adapter)
    saved = saved_of(adapter, model)
    name = next(iter(adapter_layers(model)))
    for key, rows in (("lora_A", slice(0, 2)), ("lora_B", (slice(None), slice(0, 2)))):
        saved["state_dict"][f"model.{name}.{key}"] = saved["state_dict"][f"model.{name}.{key}"][
            rows
        ]
    other = PrunedLoRA(r=4, target_r=2)
    fresh = attached(other)
    restore_structure(fresh, other, saved, "model.")
    ranks = {key: layer.rank for key, layer in adapter_layers(fresh).items()}
    assert ranks == {key: 2 if key == name else 4 for key in ranks}


@pytest.mark.parametrize(
    ("given", "shape", "sentence"),
    [
        (DropLoRA(r=2), {}, "was trained with LoRA, model.adapter is DropLoRA; give the"),
        (LoRA(r=4), {}, "was trained with r = 2, model.adapter.r is 4; give that of the"),
        (LoRA(r=2), {"seed": 1}, "an adapter fits only the base that it was trained on"),
        (
            LoRA(r=2, target_modules=["q_proj"]),
            {},
            r"adapts other target_modules: only there \S+, \S+, \S+ and 9 more; only here none",
        ),
    ],
)
def test_another_runs_checkpoint_is_refused(given: Any, shape: Any, sentence: str) -> None:
    adapter = LoRA(r=2)
    saved = saved_of(adapter, attached(adapter))
    with pytest.raises(ValueError, match=sentence):
        restore_structure(attached(given, **shape), given, saved, "model.")


def test_a_foreign_checkpoint_is_told() -> None:
    adapter = LoRA()
    with pytest.raises(ValueError, match="it has no entry 'adapter'"):
        restore_structure(attached(adapter), adapter, {"state_dict": {}}, "model.")


def test_moments_are_saved_by_the_parameters_names(random_batch: Any) -> None:
    model = attached(LoRA(r=2))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values())
    model(**random_batch(0)).loss.backward()
    optimizer.step()
    saved = optimizer_states(model, [optimizer])
    assert saved["optimizer_names"] == [list(trained)]
    states = saved["optimizer_states"][0]["state"]
    for index, parameter in enumerate(trained.values()):
        assert torch.equal(states[index]["exp_avg"], optimizer.state[parameter]["exp_avg"])
    before = {i: entry["exp_avg"].clone() for i, entry in states.items()}
    widen_optimizer_states(model, saved)  # sizes are what they were
    assert all(torch.equal(before[i], entry["exp_avg"]) for i, entry in states.items())


@pytest.mark.parametrize(("restarting", "states"), [(True, [{}]), (True, []), (False, [{}])])
def test_a_loaders_position_is_restored_only_where_it_was_passed_over(
    restarting: bool, states: list[Any]
) -> None:
    done: list[str] = []

    class Fetcher:
        def __iter__(self) -> Any:
            done.append("begun")
            return iter(())

    loop = SimpleNamespace(
        restarting=restarting,
        _combined_loader_states_to_load=states,
        _load_combined_loader_states=lambda: done.append("loaded"),
        _data_fetcher=Fetcher(),
    )
    restore_loader(loop)
    assert done == (["loaded", "begun"] if restarting and states else [])
