"""A base of shapes that knows its files is, once filled, the base that transformers loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_peft.adapters import adapter_layers
from lightning_peft.adapters.placement import adapters_on
from lightning_peft.adapters.state import fingerprint
from lightning_peft.models.loading import BaseSource, load_causal_lm
from lightning_peft.models.sharded_loading import (
    LoadsWhole,
    NameMissingValues,
    ValuesMissing,
    fill,
    stored_causal_lm,
    stored_parameters,
)
from lightning_peft.strategies import DropLoRA, LoRA, VeRA
from lightning_peft.testing import tiny_llama

CPU = torch.device("cpu")
ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
    "rope_theta": 10000.0,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_llama().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def filled(folder: Path, **arguments: Any) -> Any:
    model = stored_causal_lm(BaseSource(str(folder), **arguments))
    assert all(p.is_meta for p in model.parameters())
    fill(model, stored_parameters(model), CPU, lambda parameter: None)
    return model


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
@pytest.mark.parametrize(
    "shape", [{}, {"tie_word_embeddings": True}, {"rope_parameters": ROPE}], ids=str
)
def test_a_filled_base_is_what_transformers_loads(
    shape: dict[str, Any], dtype: str, tmp_path: Path, random_batch: Any, logits: Any
) -> None:
    tiny_llama(**shape).save_pretrained(tmp_path, max_shard_size="20KB")
    before = torch.get_rng_state()
    found, expected = (
        filled(tmp_path, dtype=dtype),
        load_causal_lm(BaseSource(str(tmp_path), dtype)),
    )
    assert torch.equal(torch.get_rng_state(), before)
    tensors = [dict(m.named_parameters()) | dict(m.named_buffers()) for m in (found, expected)]
    assert tensors[0].keys() == tensors[1].keys()
    for name, value in tensors[1].items():
        assert tensors[0][name].dtype == value.dtype
        assert torch.equal(tensors[0][name], value), name
    tied = found.lm_head.weight is found.model.embed_tokens.weight
    assert tied == shape.get("tie_word_embeddings", False)
    batch = random_batch(0)
    assert torch.equal(logits(found, batch), logits(expected, batch))
    assert found.training
    assert found.generation_config.to_dict() == expected.generation_config.to_dict()


def test_the_fingerprint_is_read_from_the_files(folder: Path) -> None:
    model = stored_causal_lm(BaseSource(str(folder), "bfloat16"))
    assert fingerprint(model) == fingerprint(load_causal_lm(BaseSource(str(folder), "bfloat16")))
    assert fingerprint(model) != fingerprint(load_causal_lm(BaseSource(str(folder))))


@pytest.mark.parametrize("strategy", [LoRA, DropLoRA, VeRA])
def test_adapters_begin_as_over_a_loaded_base(strategy: Any, folder: Path) -> None:
    models = [stored_causal_lm(BaseSource(str(folder))), load_causal_lm(BaseSource(str(folder)))]
    for model in models:
        torch.manual_seed(3)
        with adapters_on(CPU):
            strategy(r=4).attach(model)
    found, expected = (adapter_layers(model) for model in models)
    for name, layer in expected.items():
        for (key, value), own in zip(
            layer.named_parameters(), found[name].parameters(), strict=True
        ):
            if not key.startswith("base."):
                assert torch.equal(own, value), (name, key)


def rewrite(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: t.update({"norm": t.pop(NORM)}), "model.norm.weight is not in its files"),
        (lambda t: t.update({NORM: t[NORM][:8].clone()}), r"norm.weight has shape \(8,\) in its"),
    ],
)
def test_files_that_are_not_the_models_are_loaded_whole(
    change: Any, reason: str, folder: Path
) -> None:
    rewrite(folder, change)
    with pytest.raises(LoadsWhole, match=reason):
        stored_causal_lm(BaseSource(str(folder)))


def test_other_reasons_to_load_whole(folder: Path) -> None:
    with pytest.raises(LoadsWhole, match="it is quantized"):
        stored_causal_lm(BaseSource(str(folder), quantization="int8"))
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    with pytest.raises(LoadsWhole, match=r"it has no model\.safetensors"):
        stored_causal_lm(BaseSource(str(folder)))


@torch.no_grad()
def test_what_fails_for_lack_of_values_is_named(folder: Path) -> None:
    weight = stored_causal_lm(BaseSource(str(folder))).model.embed_tokens.weight
    with NameMissingValues():
        assert weight.norm().is_meta  # nothing was read
        for read in (lambda: float(weight.norm()), lambda: torch.zeros(weight.shape).copy_(weight)):
            with pytest.raises(ValuesMissing) as raised:
                read()
            assert isinstance(raised.value.__cause__, (NotImplementedError, RuntimeError))
        with pytest.raises(RuntimeError, match="shape"):
            torch.ones(2, 3) @ torch.ones(2, 3)
