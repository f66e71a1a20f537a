"""Liger's kernels, by a stand-in for the package that patches a model as Liger does."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import MethodType, ModuleType
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch.nn import functional as F

from lightning_peft.adapters import adapter_layers
from lightning_peft.datamodules import ArithmeticDataModule
from lightning_peft.models.liger import apply_liger, check_liger
from lightning_peft.modules import CausalLMModule
from lightning_peft.strategies import LoRA

TARGETS = ["gate_proj", "up_proj", "down_proj"]


def _swiglu(mlp: Any, x: torch.Tensor) -> torch.Tensor:
    """As LigerSwiGLUMLP.forward: the linears as they are, the product by another function."""
    mlp.calls += 1
    return mlp.down_proj(F.silu(mlp.gate_proj(x)) * mlp.up_proj(x))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Installs the stand-in; holds what it was asked for."""
    calls: list[dict[str, Any]] = []

    def apply(model: Any, **kernels: bool) -> None:
        calls.append(kernels)
        for layer in model.model.layers if kernels["swiglu"] else ():
            layer.mlp.calls = 0
            layer.mlp.__dict__["forward"] = MethodType(_swiglu, layer.mlp)

    contents: dict[str, dict[str, Any]] = {
        "liger_kernel": {},
        "liger_kernel.transformers": {"_apply_liger_kernel_to_instance": apply},
        "liger_kernel.transformers.monkey_patch": {"MODEL_TYPE_TO_APPLY_LIGER_FN": {"llama": None}},
    }
    for name, values in contents.items():
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)
    return calls


def test_rope_norms_and_swiglu_are_asked_for_and_no_loss(asked: Any, model: Any) -> None:
    apply_liger(model)
    wanted = {name for name, value in asked[0].items() if value}
    assert wanted == {"rope", "rms_norm", "swiglu"}
    # Named, since Liger's own default would be its loss.
    assert {"cross_entropy", "fused_linear_cross_entropy", "geglu"} <= asked[0].keys()


def test_another_activation_is_left_to_the_model(asked: Any, model: Any) -> None:
    model.config.hidden_act = "gelu"
    apply_liger(model)
    assert not asked[0]["swiglu"]


def test_adapters_stand_over_the_linears_of_a_patched_layer(asked: Any, model: Any) -> None:
    ids = torch.arange(5)[None] + 3
    plain = model(ids).logits
    apply_liger(model)
    torch.testing.assert_close(model(ids).logits, plain)
    LoRA(r=4, target_modules=TARGETS).attach(model)
    layers = adapter_layers(model.train())
    model(ids).logits.square().mean().backward()
    assert model.model.layers[0].mlp.calls == 2
    assert all(float(layer.lora_B.grad.norm()) > 0 for layer in layers.values())


def test_a_model_without_kernels_is_refused(asked: Any, model: Any) -> None:
    model.config.model_type = "gpt_neo"
    with pytest.raises(ValueError, match="no kernels for a model of the type gpt_neo"):
        apply_liger(model)


def test_a_cpu_is_refused_before_anything_is_loaded(asked: Any, tmp_path: Path) -> None:
    module = CausalLMModule("tiny_llama", liger=True)
    trainer = Trainer(accelerator="cpu", logger=False, max_steps=1, default_root_dir=tmp_path)
    with pytest.raises(ValueError, match="model.liger: .* on the CPU; set it to false"):
        trainer.fit(module, datamodule=ArithmeticDataModule())
    assert module.model is None


def test_a_missing_package_is_named() -> None:
    if "liger_kernel" in sys.modules:
        pytest.skip("liger-kernel is installed")
    with pytest.raises(ValueError, match=r"pip install 'lightning-peft\[liger\]'"):
        check_liger("cuda:0")


def test_a_module_outside_of_a_trainer_is_as_it_was(asked: Any) -> None:
    module = CausalLMModule("tiny_llama", liger=True)
    module.configure_model()
    assert asked == []
