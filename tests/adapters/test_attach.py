"""Targets resolve as PEFT resolves them, and the report tells what was done."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from lightning_peft.adapters import LoRALinear, adapter_layers, match_targets
from lightning_peft.strategies import LoRA

PATTERNS: dict[str, dict[str, Any]] = {
    "ends of names": {"target_modules": ["q_proj", "v_proj"]},
    "longer ends": {"target_modules": ["0.self_attn.q_proj", "mlp.down_proj"]},
    "full name": {"target_modules": ["model.layers.1.self_attn.o_proj"]},
    "overlapping": {"target_modules": ["q_proj", "self_attn.q_proj", "k_proj"]},
    "regex": {"target_modules": r".*layers\.1\..*(up|down)_proj"},
    "regex of the head": {"target_modules": r"lm_head|.*\.k_proj"},
    "head by name": {"target_modules": ["lm_head"]},
    "all": {"target_modules": "all-linear"},
    "all but a list": {"target_modules": "all-linear", "exclude_modules": ["gate_proj", "q_proj"]},
    "list but a regex": {
        "target_modules": ["q_proj", "v_proj"],
        "exclude_modules": r".*\.0\..*",
    },
    "regex but a list": {"target_modules": r".*_proj", "exclude_modules": ["1.mlp.up_proj"]},
}


def names_in_peft(model: nn.Module, **config: Any) -> list[str]:
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inject_adapter_in_model(LoraConfig(r=2, **config), model)
    return [name for name, module in model.named_modules() if isinstance(module, LoraLayer)]


@pytest.mark.parametrize("patterns", PATTERNS.values(), ids=PATTERNS.keys())
def test_the_same_layers_as_in_peft(patterns, tiny_llama) -> None:
    expected = names_in_peft(tiny_llama(), **patterns)
    model = tiny_llama()
    LoRA(r=2, **patterns).attach(model)
    assert list(adapter_layers(model)) == expected
    assert expected


@pytest.mark.parametrize("saved", [None, ["classifier"]])
def test_all_linear_leaves_a_classification_head_alone_as_peft_does(saved) -> None:
    from transformers import RobertaConfig, RobertaForSequenceClassification

    config = RobertaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import LoraLayer

    patterns: dict[str, Any] = {"target_modules": "all-linear", "modules_to_save": saved}
    # As a user calls it: PEFT then leaves the head alone by itself (and changes the list).
    theirs = get_peft_model(
        RobertaForSequenceClassification(config),
        LoraConfig(r=2, task_type="SEQ_CLS", **copy.deepcopy(patterns)),
    )
    expected = [n for n, m in theirs.base_model.model.named_modules() if isinstance(m, LoraLayer)]
    model = RobertaForSequenceClassification(config)
    LoRA(r=2, **patterns).attach(model)
    assert list(adapter_layers(model)) == expected
    heads = {n for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n}
    own = {n for n, _ in model.named_parameters() if n.startswith("classifier.")}
    assert heads == (own if saved else set())


def test_each_layer_counts_for_the_first_pattern_that_names_it(tiny_llama) -> None:
    matched = match_targets(tiny_llama(), ["q_proj", "self_attn.q_proj", "0.self_attn.k_proj"])
    layers = ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]
    assert matched == {
        "q_proj": layers,
        "self_attn.q_proj": [],
        "0.self_attn.k_proj": ["model.layers.0.self_attn.k_proj"],
    }


@pytest.mark.parametrize(
    ("target_modules", "sentence"),
    [
        (["q_pro"], "'q_pro' matches no linear layer; near names are .*q_proj"),
        (["query", "v_proj"], "'query' matches no linear layer; near names are "),
        (["layers.7.self_attn.q_proj"], "near names are q_proj"),
        (r".*\.qq_proj", "matches no linear layer"),
        ("q_proj", r"as a regex 'q_proj' matches no linear layer's full name; the list \[q_proj\]"),
        (["embed_tokens"], "'embed_tokens' names model.embed_tokens, a Embedding; only"),
        ("*_proj", r"'\*_proj' is not a regular expression"),
        ([], r"matches no linear layer"),
    ],
)
def test_what_matches_nothing_is_refused_with_near_names(
    target_modules, sentence, tiny_llama
) -> None:
    model = tiny_llama()
    with pytest.raises(ValueError, match=sentence):
        LoRA(r=2, target_modules=target_modules).attach(model)
    # Nothing half-done.
    assert not adapter_layers(model)
    assert all(p.requires_grad for p in model.parameters())


def test_everything_excluded_is_refused(tiny_llama) -> None:
    with pytest.raises(ValueError, match="matches no linear layer"):
        match_targets(tiny_llama(), ["q_proj"], exclude_modules=["q_proj"])


def test_a_model_without_linears_is_refused() -> None:
    with pytest.raises(ValueError, match="matches nothing, since the model has no linear layer"):
        match_targets(nn.Sequential(nn.ReLU()), ["q_proj"])


def test_the_report_counts(tiny_llama) -> None:
    model = tiny_llama()
    base = sum(p.numel() for p in model.parameters())
    strategy = LoRA(r=3, target_modules=["q_proj", "k_proj"], modules_to_save=["lm_head"])
    report = strategy.attach(model)
    # q_proj is 32 x 32, k_proj (two of four heads) 16 x 32, lm_head 61 x 32; two layers.
    q, k, head = 2 * 3 * (32 + 32), 2 * 3 * (16 + 32), 61 * 32
    assert report.matched == {"q_proj": 2, "k_proj": 2}
    assert report.parameters == {"q_proj": q, "k_proj": k}
    assert report.trainable == q + k + head
    assert report.total == base + q + k
    assert report.dtypes == {"base": "float32", "adapters": "float32"}
    text = str(report)
    assert text.startswith(f"LoRA: {q + k + head:,} of {base + q + k:,} parameters train")
    assert "q_proj: 2 layers" in text
    assert f"k_proj {k:,}" in text


def test_the_report_tells_dtypes_apart(tiny_llama) -> None:
    report = LoRA(r=2).attach(tiny_llama().to(torch.bfloat16))
    assert report.dtypes == {"base": "bfloat16", "adapters": "float32"}


def test_mode_and_place_are_kept() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 2))).eval()
    first = model[0]
    LoRA(r=1).attach(model)
    assert list(adapter_layers(model)) == ["0", "1.0"]
    assert isinstance(model[0], LoRALinear)
    assert model[0].base is first
    assert not any(module.training for module in model.modules())
