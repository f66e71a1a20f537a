"""What PEFT writes loads here, and what is no plain LoRA is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_peft import load_peft, save_peft, trainable_parameters
from lightning_peft.adapters import adapter_layers
from lightning_peft.adapters.peft_reading import unreadable
from lightning_peft.strategies import LoRA

TOLERANCE = {"rtol": 0.0, "atol": 1e-5}


def test_a_loaded_adapter_trains_what_was_trained(tiny_llama, tmp_path) -> None:
    model = tiny_llama()
    saved = ["lm_head", "norm", "1.post_attention_layernorm"]
    LoRA(r=4, target_modules=["q_proj"], modules_to_save=saved).attach(model)
    save_peft(model, tmp_path)
    loaded = load_peft(tiny_llama(), tmp_path)
    trained = {n for n, p in loaded.named_parameters() if p.requires_grad}
    assert trained == {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable_parameters(loaded, include_saved=True) == trainable_parameters(
        model, include_saved=True
    )


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


def test_what_makes_an_adapter_unreadable_is_named(saved) -> None:
    assert unreadable(saved) is None
    path = saved / "adapter_config.json"
    for change in ({"peft_type": "LOHA"}, {"use_dora": True}, {"lora_bias": True}):
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
        assert unreadable(saved) == next(iter(change))
        back = dict.fromkeys(change)  # null is what PEFT writes for "not set"
        path.write_text(json.dumps({**json.loads(path.read_text()), **back}))
        assert unreadable(saved) is None


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_16", "olora", "corda", "loftq"])
def test_an_adapter_whose_start_changed_the_base_is_refused(start, saved, tiny_llama) -> None:
    path = saved / "adapter_config.json"
    config = {**json.loads(path.read_text()), "init_lora_weights": start}
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"init_lora_weights: '{start}', which changes the base"):
        load_peft(tiny_llama(), saved)


# The two files must say the same.


def change(folder: Path, tensors: dict[str, torch.Tensor | None], **config: Any) -> None:
    """Change keys of a configuration, and add or (None) take away tensors."""
    from safetensors.torch import load_file, save_file

    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    weights = folder / "adapter_model.safetensors"
    found = {**load_file(weights), **tensors}
    save_file({k: v for k, v in found.items() if v is not None}, weights)


PREFIX, FIRST = "base_model.model.", "model.layers.0.self_attn.q_proj"
PAIR = (f"{PREFIX}{FIRST}.lora_A.weight", f"{PREFIX}{FIRST}.lora_B.weight")
HEAD = {f"{PREFIX}lm_head.weight": torch.ones(61, 32)}


@pytest.mark.parametrize(
    ("tensors", "config", "sentence"),
    [
        ({}, {"r": 3}, r"config.json gives .* rank 3 \(r\), but .* holds rank 2; the two files"),
        ({}, {"rank_pattern": {"down_proj": 5}}, r"down_proj rank 5 \(rank_pattern\), but"),
        (dict.fromkeys(PAIR), {}, f"has {FIRST} among its target_modules, but .* holds no lora_A"),
        ({}, {"target_modules": ["q_proj"]}, "adapts .*down_proj, which target_modules of .* does"),
        ({}, {"target_modules": ["q_proj", "down_proj", "norm"]}, "has model.norm, a LlamaRMSNorm"),
        ({}, {"exclude_modules": ["0.self_attn.q_proj"]}, f"adapts {FIRST}, which target_modules"),
        ({}, {"modules_to_save": ["lm_head"]}, "modules_to_save: 'lm_head', but .* holds no lm_h"),
        ({}, {"modules_to_save": ["gone"]}, "modules_to_save: 'gone', which is the end of no"),
        (
            {f"{PREFIX}model.norm.weight": torch.ones(32)},
            {},
            "holds model.norm.weight, which modules_to_save of adapter_config.json does not name",
        ),
        (
            {f"{PREFIX}lm_head.weight": torch.ones(61, 32, dtype=torch.int64)},
            {"modules_to_save": ["lm_head"]},
            "holds lm_head.weight in torch.int64, this model torch.float32",
        ),
        (
            {f"{PREFIX}lm_head.weight": torch.full((61, 32), 1e300, dtype=torch.float64)},
            {"modules_to_save": ["lm_head"]},
            "holds lm_head.weight with values that are an infinite value in this model's",
        ),
        ({PAIR[0]: torch.full((2, 32), 1e300, dtype=torch.float64)}, {}, "lora_A of .* infinite"),
        ({PAIR[1]: torch.full((32, 2), torch.nan)}, {}, "holds .*lora_B.weight with NaN"),
        ({}, {"alpha_pattern": {"(.|..|...)+[A-Z]": 3}}, "alpha_pattern: the regular expression"),
    ],
)
def test_what_one_file_says_alone_is_refused(tensors, config, sentence, saved, tiny_llama) -> None:
    change(saved, tensors, **config)
    model = tiny_llama()
    with pytest.raises(ValueError, match=sentence) as caught:
        load_peft(model, saved)
    assert str(saved) in str(caught.value)
    assert not adapter_layers(model)
    assert all(p.requires_grad for p in model.parameters())


def test_embeddings_may_be_saved_without_being_named_and_go_on_training(saved, tiny_llama) -> None:
    change(saved, HEAD)
    loaded = load_peft(tiny_llama(), saved)
    assert torch.equal(loaded.lm_head.weight, torch.ones(61, 32))
    assert loaded.lm_head.weight.requires_grad  # so that it is saved again


def test_the_heads_that_peft_names_for_every_classifier_need_not_be_there(
    saved, tiny_llama
) -> None:
    change(saved, {}, modules_to_save=["classifier", "score"])
    assert len(adapter_layers(load_peft(tiny_llama(), saved))) == 4


def test_a_head_that_is_tied_to_the_embeddings_is_not_loaded_into_both(saved, tiny_llama) -> None:
    change(saved, HEAD, modules_to_save=["lm_head"])
    with pytest.raises(ValueError, match=r"which this model has in common with model.embed_tokens"):
        load_peft(tiny_llama(tie_word_embeddings=True), saved)
    both = {**HEAD, f"{PREFIX}model.embed_tokens.weight": torch.ones(61, 32)}
    change(saved, both, modules_to_save=["lm_head", "embed_tokens"])
    loaded = load_peft(tiny_llama(tie_word_embeddings=True), saved)
    assert torch.equal(loaded.model.embed_tokens.weight, torch.ones(61, 32))


def test_nothing_that_the_configuration_names_is_fetched_or_run(
    saved, tiny_llama, monkeypatch
) -> None:
    import socket

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("something was fetched")

    monkeypatch.setattr(socket, "socket", refuse)
    mapping = {"base_model_class": "Popen", "parent_library": "subprocess"}
    change(saved, {}, base_model_name_or_path="someone/else", auto_mapping=mapping, revision="x")
    assert len(adapter_layers(load_peft(tiny_llama(), saved))) == 4
