"""What is summed over a forward, and over processes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from lightning_peft.adapters.attach import adapter_layers
from lightning_peft.callbacks import measurement
from lightning_peft.callbacks.measurement import LayerWatch, Seen, seen_by_all, weight_changes
from lightning_peft.strategies import LoRA


@pytest.fixture
def adapted(tiny_llama):
    model = tiny_llama()
    LoRA(r=4, init_lora_weights=False, target_modules=["q_proj"]).attach(model)
    return model


def test_totals_grow_over_the_forwards_between_start_and_stop(adapted, random_batch) -> None:
    batch = random_batch(0)
    watch = LayerWatch(adapted)
    watch.start()
    adapted(**batch)
    once = dict(watch.seen)
    adapted(**batch)
    watch.stop()
    adapted(**batch)
    layers = adapter_layers(adapted)
    assert list(watch.seen) == list(layers)
    for name, found in watch.seen.items():
        assert found.tokens == 2 * int(batch["attention_mask"].sum())
        assert found.rank == 4
        assert found.total == pytest.approx(2 * once[name].total.item())
        assert not layers[name]._forward_pre_hooks


def test_a_total_is_the_square_norm_of_each_layers_change(adapted, random_batch) -> None:
    inputs = {}
    name, layer = next(iter(adapter_layers(adapted).items()))
    layer.register_forward_pre_hook(lambda m, args: inputs.update(x=args[0].detach()))
    watch = LayerWatch(adapted)
    watch.start()
    batch = random_batch(1)
    adapted(**batch)
    watch.stop()
    x = inputs["x"][batch["attention_mask"].bool()]
    expected = (x @ layer.delta_weight().T).square().sum()
    assert watch.seen[name].total.item() == pytest.approx(expected.item(), rel=1e-5)


def test_one_process_has_seen_what_it_has_seen(adapted) -> None:
    seen = {"a": Seen(torch.tensor(1.0), 2, 4)}
    assert seen_by_all(adapted, seen) == seen


def test_processes_add_up_and_layers_that_none_has_seen_are_left_out(
    adapted, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, *others = adapter_layers(adapted)
    monkeypatch.setattr(measurement.distributed, "world_size", lambda: 2)
    monkeypatch.setattr(measurement.distributed, "total", lambda parts: [2 * p for p in parts])
    found = seen_by_all(adapted, {first: Seen(torch.tensor(1.5), 3, 4)})
    assert others
    assert list(found) == [first]
    assert (found[first].total.item(), found[first].tokens, found[first].rank) == (3.0, 6, 4)


def test_without_adapters_the_weights_changes_are_seen() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(5, 3))
    strategy = SimpleNamespace(model=model, weight_changes=lambda m: {"0": torch.tensor(2.5)})
    assert weight_changes(strategy) == {"0": Seen(torch.tensor(2.5), 1, 3)}
    assert weight_changes(None) == {}
    assert weight_changes(SimpleNamespace(model=None)) == {}
