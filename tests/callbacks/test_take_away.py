"""What a run leaves to take away, with adapters and without."""

from __future__ import annotations

from pathlib import Path

import torch

from lightning_peft.adapters import adapter_layers, keep_components
from lightning_peft.callbacks.take_away import take_away
from lightning_peft.strategies import FullFineTuning, LoRA


def test_adapters_are_written_in_pefts_format(tiny_llama, tmp_path: Path) -> None:
    LoRA(r=4).attach(model := tiny_llama())
    assert take_away(model, tmp_path).startswith("adapter (PEFT format)")
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()


def test_a_model_without_adapters_is_written_whole(
    tiny_llama, random_batch, logits, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    FullFineTuning().attach(model := tiny_llama())
    with torch.no_grad():
        model.lm_head.weight += 0.1 * torch.randn_like(model.lm_head.weight)
    for _ in range(2):  # the second replaces the first
        said = take_away(model, tmp_path)
    assert "its own weights were trained" in said
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(
        logits(loaded, random_batch(0)), logits(model, random_batch(0)), rtol=0, atol=0
    )


def test_where_all_components_are_gone_it_says_so(tiny_llama, tmp_path: Path) -> None:
    LoRA(r=1, target_modules=["q_proj"]).attach(model := tiny_llama())
    for layer in adapter_layers(model).values():
        keep_components(layer, torch.tensor([], dtype=torch.long))
    assert take_away(model, tmp_path) == "nothing: every layer has lost all its components"
    assert not list(tmp_path.iterdir())
