"""Quantized bases against PEFT's on the same base, merged, saved, and after an evaluation."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lightning_peft.adapters import adapter_layers, merge, save_peft
from lightning_peft.models import quantization
from lightning_peft.models.loading import BaseSource, load_causal_lm
from lightning_peft.models.quantization import check_quantization, forget_quantization
from lightning_peft.strategies import DoRA, FullFineTuning, LoRA, MiLoRA, PiSSA

KINDS = ["nf4", "int8"]


@pytest.fixture
def base(tiny_llama, tmp_path, monkeypatch) -> Callable[[str | None], Any]:
    """Loads a random LLaMA from a folder, quantized."""
    pytest.importorskip("bitsandbytes")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    folder = tmp_path / "base"
    tiny_llama(hidden_size=64, intermediate_size=128).save_pretrained(folder)
    return lambda kind: load_causal_lm(BaseSource(str(folder), quantization=kind))


@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strategy", [LoRA, DoRA])
def test_forward_and_gradients_are_pefts(
    kind, strategy, base, pair, random_batch, gradients
) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], use_dora=strategy is DoRA
    )
    own = strategy(r=4, target_modules=["q_proj", "down_proj"])
    ours, theirs = pair(own, config, base=lambda: base(kind))
    batch = random_batch(3)
    # PEFT's DoRA sends the base through other products, which int8 rounds in its own way.
    close = {"rtol": 3e-2, "atol": 3e-2} if (kind, strategy) == ("int8", DoRA) else {}
    torch.testing.assert_close(gradients(ours, batch), gradients(theirs, batch), **close)
    for name, layer in adapter_layers(ours).items():
        other = theirs.get_submodule(f"base_model.model.{name}")
        assert layer.lora_A.grad.abs().max() > 0
        close = close or {"rtol": 1e-4, "atol": 1e-6}
        torch.testing.assert_close(layer.lora_A.grad, other.lora_A.default.weight.grad, **close)
        torch.testing.assert_close(layer.lora_B.grad, other.lora_B.default.weight.grad, **close)


@pytest.mark.parametrize("kind", KINDS)
def test_linears_are_quantized_and_the_output_layer_is_not(kind, base) -> None:
    model = base(kind)
    kinds = {type(m).__name__ for m in model.model.modules() if isinstance(m, nn.Linear)}
    assert kinds == {"Linear4bit" if kind == "nf4" else "Linear8bitLt"}
    assert type(model.lm_head) is nn.Linear


def test_a_merged_model_equals_the_unmerged_one_and_is_an_ordinary_one(
    base, random_batch, logits, tmp_path
) -> None:
    from transformers import AutoModelForCausalLM

    model = base("nf4")
    LoRA(r=4, target_modules=["q_proj"], init_lora_weights=False).attach(model)
    expected = logits(model, batch := random_batch(0))
    merge(model, dequantize=True)
    forget_quantization(model)
    assert {type(m) for m in model.modules() if isinstance(m, nn.Linear)} == {nn.Linear}
    torch.testing.assert_close(logits(model, batch), expected, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(loaded, batch), expected, rtol=1e-4, atol=1e-5)


def test_what_rounds_its_inputs_too_is_not_merged(base) -> None:
    LoRA(r=4, target_modules=["q_proj"]).attach(model := base("int8"))
    with pytest.raises(ValueError, match="q_proj is a Linear8bitLt, which rounds its inputs too"):
        merge(model, dequantize=True)
    assert len(adapter_layers(model)) == 2


@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
@pytest.mark.parametrize("kind", KINDS)
def test_an_exported_adapter_gives_equal_logits_in_peft(
    kind, base, random_batch, logits, tmp_path
) -> None:
    peft = pytest.importorskip("peft")
    LoRA(r=4, init_lora_weights=False).attach(model := base(kind))
    save_peft(model, tmp_path)
    loaded = peft.PeftModel.from_pretrained(base(kind), tmp_path)
    batch = random_batch(0)
    torch.testing.assert_close(logits(loaded, batch), logits(model, batch), rtol=1e-4, atol=1e-5)


def test_training_goes_on_with_all_gradients_after_an_evaluation(
    base, random_batch, logits, gradients
) -> None:
    # bitsandbytes would repack the weights here, into a form that has no backward.
    models = [base("nf4"), base("nf4")]
    for model in models:
        torch.manual_seed(0)
        LoRA(r=4, init_lora_weights=False).attach(model)
    evaluated = models[1]
    logits(evaluated, random_batch(1))
    for model in models:
        gradients(model, random_batch(0))
    first, second = (adapter_layers(m)["model.layers.0.self_attn.q_proj"] for m in models)
    assert first.lora_A.grad.abs().max() > 0
    torch.testing.assert_close(first.lora_A.grad, second.lora_A.grad, rtol=0, atol=0)


@pytest.mark.parametrize("strategy", [PiSSA, MiLoRA, FullFineTuning])
def test_methods_that_change_the_base_say_why_they_cannot(strategy, base) -> None:
    with pytest.raises(ValueError, match="a Linear4bit .*(full precision|quantization: null)"):
        strategy().attach(base("nf4"))


def test_an_absent_package_and_an_unknown_kind_are_one_sentence(monkeypatch) -> None:
    check_quantization(None)
    with pytest.raises(ValueError, match="null or one of nf4, int8, got 'nf5'"):
        check_quantization("nf5")
    monkeypatch.setattr(quantization.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="nf4 needs bitsandbytes, which is not installed: pip"):
        check_quantization("nf4")
