"""What is written loads in PEFT, and what PEFT writes loads here."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_peft import load_peft, save_peft, trainable_parameters
from lightning_peft.adapters import adapter_layers, keep_components
from lightning_peft.strategies import DropLoRA, LoRA, LoRADrop

TOLERANCE = {"rtol": 0.0, "atol": 1e-5}


def fill(model: nn.Module) -> nn.Module:
    """Give every B random values, shared ones once."""
    torch.manual_seed(3)
    for parameter in {id(x.lora_B): x.lora_B for x in adapter_layers(model).values()}.values():
        nn.init.normal_(parameter, std=0.2)
    return model


def shrink(model: nn.Module, ranks: dict[str, int]) -> None:
    for name, layer in adapter_layers(model).items():
        for end, rank in ranks.items():
            if name.endswith(end):
                keep_components(layer, torch.randperm(layer.rank)[:rank].sort().values)


def in_peft(base: nn.Module, folder: Path) -> nn.Module:
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(base, folder)


def lora(model: nn.Module) -> None:
    LoRA(r=4, lora_alpha=7, lora_dropout=0.1).attach(model)
    fill(model)


def rslora(model: nn.Module) -> None:
    LoRA(r=4, lora_alpha=3, use_rslora=True, target_modules=["q_proj", "down_proj"]).attach(model)
    fill(model)


def mixed_ranks(model: nn.Module) -> None:
    LoRA(r=6, lora_alpha=5).attach(model)
    fill(model)
    shrink(model, {"0.self_attn.q_proj": 1, "up_proj": 3, "1.mlp.down_proj": 5})


def mixed_ranks_rslora(model: nn.Module) -> None:
    LoRA(r=6, use_rslora=True).attach(model)
    fill(model)
    shrink(model, {"self_attn.k_proj": 2, "1.mlp.gate_proj": 3})


def missing_layers(model: nn.Module) -> None:
    LoRA(r=3).attach(model)
    fill(model)
    shrink(model, {"0.self_attn.q_proj": 0, "1.self_attn.v_proj": 0, "o_proj": 0, "up_proj": 2})


def shared_parameters(model: nn.Module) -> None:
    strategy = LoRADrop(r=3, target_modules=["q_proj", "down_proj"])
    strategy.attach(model)
    entry = {"importance": 1.0, "share": 0.5}
    strategy.apply(model, {name: {**entry, "role": "shared"} for name in adapter_layers(model)})
    fill(model)


def removed_layers(model: nn.Module) -> None:
    strategy = LoRADrop(r=3, target_modules=["q_proj", "down_proj"])
    strategy.attach(model)
    roles = {n: "removed" if "layers.0" in n else "kept" for n in adapter_layers(model)}
    strategy.apply(
        model, {n: {"importance": 1.0, "share": 0.5, "role": r} for n, r in roles.items()}
    )
    fill(model)


def gates(model: nn.Module) -> None:
    DropLoRA(r=4, mask="learned").attach(model)
    fill(model)


def saved_modules(model: nn.Module) -> None:
    saved = ["lm_head", "norm", "1.post_attention_layernorm"]
    LoRA(r=4, target_modules=["q_proj"], modules_to_save=saved).attach(model)
    fill(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.1)


FORMS = [
    lora,
    rslora,
    mixed_ranks,
    mixed_ranks_rslora,
    missing_layers,
    shared_parameters,
    removed_layers,
    gates,
    saved_modules,
]


@pytest.mark.parametrize("form", FORMS)
def test_what_is_saved_is_the_same_in_peft_and_here(
    form, tiny_llama, random_batch, logits, tmp_path
) -> None:
    model, batch = tiny_llama(), random_batch(1)
    base = logits(model, batch)
    form(model)
    expected = logits(model, batch)
    assert (expected - base).abs().max() > 0.05
    save_peft(model, tmp_path)
    torch.testing.assert_close(
        logits(in_peft(tiny_llama(), tmp_path), batch), expected, **TOLERANCE
    )
    loaded = load_peft(tiny_llama(), tmp_path)
    torch.testing.assert_close(logits(loaded, batch), expected, **TOLERANCE)
    alive = {name: x.rank for name, x in adapter_layers(model).items() if x.rank}
    assert {name: x.rank for name, x in adapter_layers(loaded).items()} == alive


def test_a_loaded_adapter_trains_what_was_trained(tiny_llama, tmp_path) -> None:
    model = tiny_llama()
    saved_modules(model)
    save_peft(model, tmp_path)
    loaded = load_peft(tiny_llama(), tmp_path)
    trained = {n for n, p in loaded.named_parameters() if p.requires_grad}
    assert trained == {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable_parameters(loaded, include_saved=True) == trainable_parameters(
        model, include_saved=True
    )


def test_the_configuration_is_what_peft_users_expect(tiny_llama, tmp_path) -> None:
    model = tiny_llama()
    LoRA(r=6, lora_alpha=12, target_modules=["q_proj", "v_proj"]).attach(model)
    fill(model)
    shrink(model, {"0.self_attn.q_proj": 2})
    save_peft(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    odd = "model.layers.0.self_attn.q_proj"
    assert config["peft_type"] == "LORA"
    assert config["task_type"] == "CAUSAL_LM"
    assert (config["r"], config["lora_alpha"]) == (6, 12)
    assert config["target_modules"] == list(adapter_layers(model))
    assert config["rank_pattern"] == {"^" + re.escape(odd): 2}
    assert config["alpha_pattern"] == {"^" + re.escape(odd): 4}
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_a_short_name_does_not_match_the_ends_of_longer_ones(tmp_path) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        model = nn.ModuleDict({"q": nn.Linear(4, 4), "deep": nn.ModuleDict({"q": nn.Linear(4, 4)})})
        model.forward = lambda x: model["deep"]["q"](model["q"](x))  # type: ignore[method-assign]
        return model

    model, x = make(), torch.randn(3, 4)
    LoRA(r=2, target_modules="q").attach(model)
    fill(model)
    save_peft(model, tmp_path)
    theirs = in_peft(make(), tmp_path).base_model.model
    torch.testing.assert_close(theirs["q"](x), model["q"](x), **TOLERANCE)
    assert isinstance(theirs["deep"]["q"], nn.Linear)


THEIRS: dict[str, dict[str, Any]] = {
    "lora": {"r": 4, "lora_alpha": 7, "target_modules": ["q_proj", "v_proj"]},
    "rslora": {"r": 4, "lora_alpha": 3, "use_rslora": True, "target_modules": "all-linear"},
    "patterns": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": "all-linear",
        "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 3},
        "alpha_pattern": {"q_proj": 5, r"layers.0.*down_proj": 1},
    },
    "patterns and rslora": {
        "r": 4,
        "use_rslora": True,
        "target_modules": r".*(k|o)_proj",
        "rank_pattern": {"k_proj": 2},
        "alpha_pattern": {"o_proj": 3},
    },
    "pattern anchored": {
        "r": 4,
        "target_modules": ["q_proj"],
        "rank_pattern": {r"^model.layers.0.self_attn.q_proj": 2},
        "alpha_pattern": {r"^model.layers.0.self_attn.q_proj": 5},
    },
    "saved modules": {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("config", THEIRS.values(), ids=THEIRS.keys())
def test_what_peft_saved_loads_here(config, tiny_llama, random_batch, logits, tmp_path) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(2)
    theirs = get_peft_model(tiny_llama(), LoraConfig(task_type="CAUSAL_LM", **config))
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
                assert "lora_" in name or "modules_to_save" in name
    batch = random_batch(1)
    expected = logits(theirs, batch)
    theirs.save_pretrained(tmp_path)
    ours = load_peft(tiny_llama(), tmp_path)
    torch.testing.assert_close(logits(ours, batch), expected, **TOLERANCE)
    assert (logits(tiny_llama(), batch) - expected).abs().max() > 0.05


# Refusals.


@pytest.fixture
def saved(tiny_llama, tmp_path) -> Path:
    model = tiny_llama()
    LoRA(r=2, target_modules=["q_proj", "down_proj"]).attach(model)
    return save_peft(model, tmp_path / "adapter")


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_folder_without_a_file_is_no_adapter(file, saved, tiny_llama) -> None:
    (saved / file).unlink()
    with pytest.raises(FileNotFoundError, match=f"holds no {file}, so it is not a PEFT adapter"):
        load_peft(tiny_llama(), saved)


@pytest.mark.parametrize("size", [0, 4, 100, -10])
def test_damaged_weights_are_named(size, saved, tiny_llama) -> None:
    path = saved / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"adapter_model.safetensors is damaged or cut off"):
        load_peft(tiny_llama(), saved)


def test_a_damaged_configuration_is_named(saved, tiny_llama) -> None:
    (saved / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"adapter_config.json is not JSON"):
        load_peft(tiny_llama(), saved)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"use_dora": True}, "has use_dora: True; only False can be loaded"),
        ({"peft_type": "IA3"}, "has peft_type: 'IA3'; only 'LORA' can be loaded"),
        ({"bias": "all"}, "has bias: 'all'; only 'none' can be loaded"),
    ],
)
def test_other_kinds_of_adapters_are_refused(change, sentence, saved, tiny_llama) -> None:
    path = saved / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=sentence):
        load_peft(tiny_llama(), saved)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"hidden_size": 64}, "adapts model.layers.0.* as 32 x 48, this model has 64 x 48"),
        ({"num_hidden_layers": 1}, "adapts model.layers.1.*, where this model has nothing"),
    ],
)
def test_an_adapter_of_another_model_is_refused(change, sentence, saved, tiny_llama) -> None:
    model = tiny_llama(**change)
    with pytest.raises(ValueError, match=sentence):
        load_peft(model, saved)
    # Nothing half-done.
    assert not adapter_layers(model)
    assert all(p.requires_grad for p in model.parameters())


def test_a_half_pair_and_a_stranger_are_refused(saved, tiny_llama) -> None:
    from safetensors.torch import load_file, save_file

    path = saved / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "base_model.model.extra.weight": torch.ones(1)}, path)
    with pytest.raises(ValueError, match=r"holds extra.weight, for which the model has no place"):
        load_peft(tiny_llama(), saved)
    first = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    save_file({k: v for k, v in tensors.items() if k != first}, path)
    with pytest.raises(ValueError, match=r"holds only lora_A of model.layers.0.self_attn.q_proj"):
        load_peft(tiny_llama(), saved)


def test_a_model_with_adapters_takes_no_others(saved, tiny_llama) -> None:
    model = tiny_llama()
    LoRA(r=2).attach(model)
    with pytest.raises(ValueError, match="has adapters already"):
        load_peft(model, saved)


def test_nothing_to_save_is_refused(tiny_llama, tmp_path) -> None:
    model = tiny_llama()
    with pytest.raises(ValueError, match="no adapter of rank 1 or more"):
        save_peft(model, tmp_path / "a")
    LoRA(r=2, target_modules=["q_proj"]).attach(model)
    shrink(model, {"q_proj": 0})
    with pytest.raises(ValueError, match="no adapter of rank 1 or more"):
        save_peft(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()
