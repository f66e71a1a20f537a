"""What is saved, counted and recognised of an adapted model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_peft import trainable_parameters
from lightning_peft.adapters import (
    adapter_layers,
    adapter_state_dict,
    fingerprint,
    keep_components,
    load_adapter_state,
)
from lightning_peft.strategies import (
    AdapterStrategy,
    DoRA,
    DropLoRA,
    LoRA,
    LoRADrop,
    MiLoRA,
    PiSSA,
    SparseAdapter,
    TiedLoRA,
    VeRA,
)

ATTENTION_AND_MLP = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
# Counts that the papers print (DropLoRA tables 1 and 2, LoRA-drop table 1, 2 and appendix).
PRINTED = [
    ("llama2-7b", ATTENTION_AND_MLP, 32, 56_098_816),
    ("llama3-8b", ATTENTION_AND_MLP, 32, 56_623_104),
    ("llama2-7b", ATTENTION_AND_MLP, 64, 112_197_632),
    ("llama3-8b", ATTENTION_AND_MLP, 64, 113_246_208),
    ("llama2-7b", ["q_proj", "v_proj"], 8, 4_194_304),
    ("llama2-7b", ["q_proj", "v_proj"], 16, 8_388_608),
    ("roberta-base", ["query", "value"], 8, 294_912),
    ("roberta-large", ["query", "value"], 8, 786_432),
]
SHAPES: dict[str, dict[str, int]] = {
    "llama2-7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
    },
    "llama3-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "roberta-base": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
    },
    "roberta-large": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
    },
}


def on_meta(name: str) -> nn.Module:
    import transformers

    kind = "Llama" if name.startswith("llama") else "Roberta"
    config = getattr(transformers, f"{kind}Config")(**SHAPES[name])
    head = "CausalLM" if kind == "Llama" else "SequenceClassification"
    with torch.device("meta"):
        return getattr(transformers, f"{kind}For{head}")(config)


@pytest.mark.parametrize(("name", "targets", "r", "count"), PRINTED)
@pytest.mark.parametrize("strategy", [LoRA, DropLoRA])
def test_counts_are_those_of_the_papers(strategy, name, targets, r, count) -> None:
    model = on_meta(name)
    report = strategy(r=r, target_modules=targets).attach(model)
    assert trainable_parameters(model) == count
    assert sum(report.parameters.values()) == report.trainable == count
    assert all(p.is_meta for p in model.parameters())


@pytest.mark.parametrize(
    ("strategy", "name", "targets", "count"),
    [
        (DoRA(32), "llama2-7b", ATTENTION_AND_MLP, 56_975_360),
        (DoRA(32), "llama3-8b", ATTENTION_AND_MLP, 57_409_536),
        (DoRA(64), "llama2-7b", ATTENTION_AND_MLP, 113_074_176),
        (PiSSA(32), "llama2-7b", ATTENTION_AND_MLP, 56_098_816),
        (MiLoRA(64), "llama3-8b", ATTENTION_AND_MLP, 113_246_208),
        (VeRA(512), "roberta-base", ["query", "value"], 30_720),
        (TiedLoRA(56), "roberta-base", ["query", "value"], 148_128),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, AdapterStrategy) else None,
)
def test_counts_of_the_baselines_are_those_of_the_papers(strategy, name, targets, count) -> None:
    strategy.target_modules = targets
    strategy.attach(model := on_meta(name))
    assert trainable_parameters(model) == count


def test_half_of_a_sparse_adapters_values_train_as_printed() -> None:
    linears = {f"{kind}{i}": nn.Linear(768, 768) for i in range(12) for kind in ("query", "value")}
    model = nn.ModuleDict(linears)  # RoBERTa-base's, by shape
    strategy = SparseAdapter(r=8, sparsity=0.5, start_step=1)
    strategy.attach(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.grad = torch.randn_like(parameter)
        nn.init.normal_(parameter)
    strategy.before_step(model, torch.optim.SGD(trained, 0.1), 1)
    assert trainable_parameters(model) == 147_456


def test_every_printed_count_is_among_these() -> None:
    path = Path(__file__).parents[3] / "shared" / "reference" / "trainable_parameters.json"
    if not path.is_file():
        pytest.skip("the papers' numbers are not at hand")
    tested = {count for *_, count in PRINTED}
    tested |= {56_975_360, 57_409_536, 113_074_176, 30_720, 148_128, 147_456}
    assert {row["exact"] for row in json.loads(path.read_text())["rows"]} == tested


def test_heads_count_when_asked_and_shared_tensors_once(tiny_llama) -> None:
    model = tiny_llama()
    strategy = LoRADrop(r=3, target_modules=["q_proj"], modules_to_save=["lm_head"])
    strategy.attach(model)
    own, head = 3 * (32 + 32), 61 * 32
    assert trainable_parameters(model) == 2 * own
    assert trainable_parameters(model, include_saved=True) == 2 * own + head
    entry = {"importance": 1.0, "share": 0.5, "role": "shared"}
    strategy.apply(model, dict.fromkeys(adapter_layers(model), entry))
    assert trainable_parameters(model) == own
    assert trainable_parameters(model, include_saved=True) == own + head


def test_the_state_holds_what_is_not_the_bases(tiny_llama) -> None:
    model = tiny_llama()
    saved = ["lm_head"]
    DropLoRA(r=2, mask="step", target_modules=["q_proj"], modules_to_save=saved).attach(model)
    layers = [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
    parts = ("lora_A", "lora_B", "gate.mask")
    expected = {f"{layer}.{part}" for layer in layers for part in parts} | {"lm_head.weight"}
    assert set(adapter_state_dict(model)) == expected


def test_a_state_of_lower_ranks_loads_into_a_fresh_model(tiny_llama, random_batch, logits) -> None:
    def attached(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        model = tiny_llama()
        DropLoRA(r=5, mask="learned").attach(model)
        return model

    model, fresh = attached(0), attached(1)
    for i, layer in enumerate(adapter_layers(model).values()):
        nn.init.normal_(layer.lora_B, std=0.2)
        keep_components(layer, torch.arange(i % 6))
    load_adapter_state(fresh, adapter_state_dict(model))
    batch = random_batch(1)
    assert torch.equal(logits(fresh, batch), logits(model, batch))
    assert [x.rank for x in adapter_layers(fresh).values()] == [i % 6 for i in range(14)]


def test_a_state_of_other_layers_is_refused(tiny_llama) -> None:
    def attached(*targets: str, r: int = 2) -> nn.Module:
        model = tiny_llama()
        LoRA(r=r, target_modules=list(targets)).attach(model)
        return model

    model = attached("q_proj")
    missing = "model.layers.0.self_attn.v_proj.lora_A is not in the saved state, nor are 3 more"
    with pytest.raises(ValueError, match=missing):
        load_adapter_state(attached("q_proj", "v_proj"), adapter_state_dict(model))
    stranger = "model.layers.0.self_attn.v_proj.lora_A has no place in the model"
    with pytest.raises(ValueError, match=stranger):
        load_adapter_state(model, adapter_state_dict(attached("q_proj", "v_proj")))
    with pytest.raises(ValueError, match="a saved rank of 3 does not fit a layer of rank 2"):
        load_adapter_state(model, adapter_state_dict(attached("q_proj", r=3)))


def test_a_fingerprint_tells_bases_apart(tiny_llama) -> None:
    one = fingerprint(tiny_llama(0))
    assert one == fingerprint(tiny_llama(0))
    assert len(one) == 16
    others = [
        fingerprint(tiny_llama(1)),
        fingerprint(tiny_llama(0, hidden_size=64)),
        fingerprint(tiny_llama(0).to(torch.bfloat16)),
    ]
    assert len({one, *others}) == 4


def test_a_fingerprint_is_of_the_base_alone(tiny_llama) -> None:
    model = tiny_llama()
    expected = fingerprint(model)
    strategy: Any = LoRA(r=2)
    strategy.attach(model)
    assert strategy.base_fingerprint == expected


def test_a_fingerprint_works_without_weights() -> None:
    meta = fingerprint(on_meta("roberta-base"))
    assert meta == fingerprint(on_meta("roberta-base"))
    assert meta != fingerprint(on_meta("roberta-large"))
