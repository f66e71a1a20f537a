"""Models in shape only are those that would be loaded, but for their values."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightning_peft.models.loading import BaseSource, load_causal_lm
from lightning_peft.modules import CausalLMModule, SequenceClassificationModule
from lightning_peft.modules.meta import meta_base, read_config
from lightning_peft.strategies import LoRA
from lightning_peft.testing import tiny_llama


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_llama().save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").rename(tmp_path / "weights")
    return tmp_path / "base"


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_shapes_and_dtypes_are_those_of_the_loaded_model(
    dtype: str, folder: Path, tmp_path: Path
) -> None:
    found = meta_base(CausalLMModule(str(folder), dtype=dtype))
    (tmp_path / "weights").rename(folder / "model.safetensors")
    loaded = load_causal_lm(BaseSource(str(folder), dtype))
    assert found.training
    assert all(p.is_meta for p in found.parameters())
    shapes = [{n: (p.shape, p.dtype) for n, p in m.named_parameters()} for m in (found, loaded)]
    assert shapes[0] == shapes[1]


def test_a_classifiers_head_trains_in_single_precision(folder: Path) -> None:
    adapter = LoRA(r=2, modules_to_save=["norm"])
    module = SequenceClassificationModule(str(folder), adapter=adapter, dtype="bfloat16")
    model = meta_base(module, labels=3)
    assert adapter.modules_to_save == ["norm", "score"]
    assert (model.score.out_features, model.score.weight.dtype) == (3, torch.float32)
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16


def test_a_dtype_that_is_none_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="model.dtype must be one of auto"):
        meta_base(CausalLMModule(str(folder), dtype="float8"))


def test_a_folder_without_a_configuration_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no config.json that transformers can read"):
        read_config(str(tmp_path))
