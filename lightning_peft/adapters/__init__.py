"""Layers and what is done to them: plain PyTorch, no Lightning, no transformers."""

from lightning_peft.adapters.adapted import AdaptedLayer, PeftForm
from lightning_peft.adapters.attach import (
    AttachReport,
    adapter_layers,
    kind_of,
    lora_layers,
    match_targets,
)
from lightning_peft.adapters.compiled import compile_model
from lightning_peft.adapters.gates import Gate
from lightning_peft.adapters.growth import add_components
from lightning_peft.adapters.layer import LoRALinear
from lightning_peft.adapters.merge import merge
from lightning_peft.adapters.observe import observe_inputs
from lightning_peft.adapters.peft_format import save_peft
from lightning_peft.adapters.peft_reading import load_peft
from lightning_peft.adapters.shrink import keep_components
from lightning_peft.adapters.state import (
    adapter_state_dict,
    fingerprint,
    load_adapter_state,
    trainable_parameters,
)

__all__ = [
    "AdaptedLayer",
    "AttachReport",
    "Gate",
    "LoRALinear",
    "PeftForm",
    "adapter_layers",
    "adapter_state_dict",
    "add_components",
    "compile_model",
    "fingerprint",
    "keep_components",
    "kind_of",
    "load_adapter_state",
    "load_peft",
    "lora_layers",
    "match_targets",
    "merge",
    "observe_inputs",
    "save_peft",
    "trainable_parameters",
]
