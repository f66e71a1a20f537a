"""LoRA-drop: importance, layout, sharing, and a fresh start after the probe."""

from __future__ import annotations

import copy
import functools
import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from lightning_peft import trainable_parameters
from lightning_peft.adapters import adapter_layers, adapter_state_dict, load_adapter_state
from lightning_peft.strategies import LoRADrop
from lightning_peft.strategies.layer_importance import measure_importance

Small = functools.partial(LoRADrop, r=3, target_modules=["q_proj", "v_proj"], probe_epochs=2)
Q = [f"model.layers.{i}.self_attn.q_proj" for i in range(3)]
V = [f"model.layers.{i}.self_attn.v_proj" for i in range(3)]


@pytest.fixture
def llama(tiny_llama) -> Any:
    return functools.partial(tiny_llama, num_hidden_layers=3)


@pytest.fixture
def batches(random_batch) -> list[Any]:
    return [random_batch(i, rows=2 + i) for i in range(3)]


def attached(strategy: LoRADrop, make: Any) -> nn.Module:
    torch.manual_seed(0)
    model = make()
    strategy.attach(model)
    return model.train()


def prepare(strategy: LoRADrop, model: Any, batches: list[Any]) -> None:
    strategy.prepare(
        model,
        lambda share: batches,
        lambda batch: model(**batch).loss,
        functools.partial(torch.optim.AdamW, lr=0.01),
    )


# Importance.


@pytest.mark.parametrize(("bound", "steps"), [(None, 6), (4, 4)])
def test_the_probe_takes_its_steps_and_no_more(bound, steps, llama, batches) -> None:
    strategy, losses = Small(max_probe_steps=bound), []
    model = attached(strategy, llama)

    def loss(batch: Any) -> Any:
        losses.append(model(**batch).loss)
        return losses[-1]

    strategy.prepare(model, lambda share: batches, loss)
    # Besides its steps the probe looks at each batch once for the importance.
    assert len(losses) == steps + len(batches)


def test_the_sample_is_the_share_that_was_asked_for(llama, batches) -> None:
    strategy, shares = Small(sample_ratio=0.25), []
    model = attached(strategy, llama)
    strategy.prepare(
        model, lambda share: shares.append(share) or batches, lambda b: model(**b).loss
    )
    assert shares == [0.25]


def test_the_importance_is_that_of_a_trained_probe(llama, batches) -> None:
    strategy = Small()
    model = attached(strategy, llama)
    twin = copy.deepcopy(model)
    prepare(strategy, model, batches)
    optimizer = torch.optim.AdamW([p for p in twin.parameters() if p.requires_grad], lr=0.01)
    for batch in batches * 2:
        twin(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    expected = measure_importance(twin, batches, lambda batch: twin(**batch).loss)
    assert {n: e["importance"] for n, e in strategy.layout.items()} == pytest.approx(expected)
    for names in (Q, V):
        assert sum(strategy.layout[n]["share"] for n in names) == pytest.approx(1)


# Layout.


@pytest.mark.parametrize(
    ("ablation", "threshold", "kept"),
    [
        # Shares of q: 0.1, 0.6, 0.3; of v: 0.5, 0.05, 0.45.
        (None, 0.9, {Q[1], Q[2], V[0], V[2]}),
        (None, 0.5, {Q[1], V[0]}),
        (None, 0.95, {*Q, V[0], V[2]}),
        ("without_share", 0.9, {Q[1], Q[2], V[0], V[2]}),
        ("inverse", 0.9, {Q[0], Q[2], V[1], V[2]}),
        ("inverse", 0.5, {Q[0], V[1]}),
        ("top_k", 0.9, {Q[1], Q[2], V[1], V[2]}),
        ("top_k", 0.5, {Q[2], V[2]}),
    ],
)
def test_the_layout_of_known_importances(ablation, threshold, kept, llama) -> None:
    strategy = Small(threshold=threshold, ablation=ablation)
    model = attached(strategy, llama)
    importance = dict(zip(Q + V, [1.0, 6.0, 3.0, 10.0, 1.0, 9.0], strict=True))
    layout = strategy.decide(importance, adapter_layers(model))
    rest = "removed" if ablation == "without_share" else "shared"
    roles = {name: entry["role"] for name, entry in layout.items()}
    assert roles == {name: "kept" if name in kept else rest for name in Q + V}
    assert layout[Q[1]]["importance"] == 6
    assert layout[Q[1]]["share"] == pytest.approx(0.6)


def test_the_random_ablation_keeps_as_many(llama) -> None:
    strategy = Small(threshold=0.5, ablation="random")
    model = attached(strategy, llama)
    importance = dict(zip(Q + V, [1.0, 6.0, 3.0, 10.0, 1.0, 9.0], strict=True))
    seen = set()
    for seed in range(20):
        torch.manual_seed(seed)
        layout = strategy.decide(importance, adapter_layers(model))
        kept = [name for name, entry in layout.items() if entry["role"] == "kept"]
        assert [sum(n in names for n in kept) for names in (Q, V)] == [1, 1]
        seen.update(kept)
    assert seen == {*Q, *V}


def layout_of(kept: set[str], rest: str) -> dict[str, dict[str, Any]]:
    entry = {"importance": 1.0, "share": 0.25}
    return {name: {**entry, "role": "kept" if name in kept else rest} for name in Q + V}


def test_sharing_is_one_parameter_for_each_kind(llama) -> None:
    strategy = Small()
    model = attached(strategy, llama)
    strategy.apply(model, layout_of({Q[1]}, "shared"))
    layers = adapter_layers(model)
    assert layers[Q[0]].lora_A is layers[Q[2]].lora_A
    assert layers[Q[0]].lora_B is layers[Q[2]].lora_B
    assert layers[Q[1]].lora_A is not layers[Q[0]].lora_A
    assert len({id(layers[n].lora_A) for n in V}) == 1
    q, v = 3 * (32 + 32), 3 * (32 + 16)
    assert trainable_parameters(model) == 2 * q + v
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * q + v
    # The gradient of what is shared is the sum over those that share.
    nn.init.normal_(layers[V[0]].lora_B)
    outputs = [layers[n](torch.ones(1, 32)).sum() for n in V]
    expected = sum(
        torch.autograd.grad(o, layers[V[0]].lora_A, retain_graph=True)[0] for o in outputs
    )
    sum(outputs).backward()
    torch.testing.assert_close(layers[V[0]].lora_A.grad, expected)


def test_removing_leaves_the_plain_linear(llama) -> None:
    strategy = Small(ablation="without_share")
    model = attached(strategy, llama)
    base = model.get_submodule(Q[0]).base
    strategy.apply(model, layout_of({Q[1], V[0]}, "removed"))
    assert list(adapter_layers(model)) == sorted([Q[1], V[0]], key=lambda n: n.split(".")[2])
    assert model.get_submodule(Q[0]) is base
    events = {(d["layer"], d["event"], d["rank"]) for d in strategy.decisions}
    assert events == {(name, "removed", 0) for name in {*Q, *V} - {Q[1], V[0]}}


# A fresh start.


def test_after_the_probe_training_starts_fresh(llama, batches) -> None:
    strategy = Small(threshold=0.6, lora_dropout=0.1)
    model = attached(strategy, llama)
    initial = {n: t.clone() for n, t in adapter_state_dict(model).items()}
    prepare(strategy, model, batches)
    layers = adapter_layers(model)
    shared = {n for n, e in strategy.layout.items() if e["role"] == "shared"}
    assert shared
    for name, layer in layers.items():
        leader = name
        if name in shared:
            leader = next(n for n in layers if n in shared and n[-6:] == name[-6:])
        assert torch.equal(layer.lora_A, initial[f"{leader}.lora_A"])
        assert not layer.lora_B.any()
        assert layer.lora_A.grad is None
    assert model.training


def test_the_random_stream_is_the_one_under_a_given_layout(llama, batches, tmp_path) -> None:
    probed = Small(threshold=0.6, lora_dropout=0.1, ablation="random")
    model = attached(probed, llama)
    prepare(probed, model, batches)
    after_probe = torch.rand(3)
    trainer: Any = SimpleNamespace(
        is_global_zero=True, log_dir=str(tmp_path), loggers=[None], fast_dev_run=False
    )
    probed.on_fit_start(trainer, None)  # type: ignore[arg-type]
    given = Small(lora_dropout=0.1, layout=str(tmp_path / "layout.json"))
    other = attached(given, llama)
    prepare(given, other, [])  # looks at nothing
    assert torch.equal(torch.rand(3), after_probe)
    assert given.layout == probed.layout
    one, two = adapter_state_dict(model), adapter_state_dict(other)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert given.decisions == probed.decisions


@pytest.mark.parametrize("ablation", [None, "without_share", "inverse", "random", "top_k"])
def test_a_checkpoint_brings_its_layout(ablation, llama, batches, random_batch, logits) -> None:
    first = Small(threshold=0.6, ablation=ablation)
    model = attached(first, llama)
    prepare(first, model, batches)
    for layer in adapter_layers(model).values():
        nn.init.normal_(layer.lora_B)
    second = Small(threshold=0.6, ablation=ablation)
    other = attached(second, llama)
    state = first.state_dict()
    second.restructure(other, state)
    load_adapter_state(other, adapter_state_dict(model))
    second.load_state_dict(state)
    assert second.layout == first.layout
    assert second.decisions == first.decisions
    assert trainable_parameters(other) == trainable_parameters(model)
    assert torch.equal(logits(other, random_batch(9)), logits(model, random_batch(9)))


def test_a_checkpoint_of_another_layout_is_refused(llama, tmp_path) -> None:
    file = tmp_path / "layout.json"
    file.write_text(json.dumps(layout_of({Q[0]}, "shared")))
    strategy = Small(layout=str(file))
    model = attached(strategy, llama)
    strategy.restructure(model, {"layout": layout_of({Q[0]}, "shared")})
    with pytest.raises(ValueError, match="trained under another LoRA-drop layout"):
        strategy.restructure(model, {"layout": layout_of({Q[1]}, "shared")})


# Refusals.


def test_an_empty_sample_is_refused(llama) -> None:
    strategy = Small(sample_ratio=0.01)
    with pytest.raises(ValueError, match="sample is empty at sample_ratio 0.01"):
        prepare(strategy, attached(strategy, llama), [])


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "is not JSON"),
        ("[]", r"does not give a role \(kept, shared, removed\)"),
        ('{"q": {"role": "mine"}}', "does not give a role"),
        ('{"q": {"role": "kept"}}', "is of other layers: .* is not in the layout"),
    ],
)
def test_a_wrong_layout_file_is_named(text, sentence, llama, tmp_path) -> None:
    file = tmp_path / "layout.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=sentence):
        attached(Small(layout=str(file)), llama)


def test_a_layout_file_that_is_not_there_is_named(llama, tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="layout: .*none.json does not exist"):
        attached(Small(layout=str(tmp_path / "none.json")), llama)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"threshold": 0.0}, r"threshold must lie in \(0, 1"),
        ({"threshold": 1.1}, r"threshold must lie in \(0, 1.* got 1.1"),
        ({"sample_ratio": 0}, r"sample_ratio must lie in \(0, 1\], got 0"),
        ({"probe_epochs": 0}, "probe_epochs must be at least 1, got 0"),
        ({"max_probe_steps": 0}, "max_probe_steps must be at least 1, got 0"),
        ({"ablation": "none"}, "ablation must be .*, got 'none'"),
    ],
)
def test_wrong_values_are_refused_at_once(arguments, sentence) -> None:
    with pytest.raises(ValueError, match=sentence):
        LoRADrop(**arguments)
