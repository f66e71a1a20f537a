"""Reading an adapter in PEFT's format, where it is plain LoRA."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from lightning_peft.adapters.attach import adapter_layers
from lightning_peft.adapters.layer import LoRALinear
from lightning_peft.adapters.peft_format import CONFIG, PREFIX, WEIGHTS
from lightning_peft.errors import MissingFile, UserError

_KEY = re.compile(re.escape(PREFIX) + r"(?P<name>.+)\.lora_(?P<side>[AB])\.weight")
_PLAIN = {"peft_type": "LORA", "use_dora": False, "bias": "none", "lora_bias": False}


def _not_plain(config: Mapping[str, Any]) -> str | None:
    return next(
        (k for k, plain in _PLAIN.items() if config.get(k, plain) not in (plain, None)), None
    )


def unreadable(folder: str | Path) -> str | None:
    """The key of an adapter's configuration by which it is no plain LoRA; None where it is one."""
    return _not_plain(json.loads((Path(folder) / CONFIG).read_text()))


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    for file in (CONFIG, WEIGHTS):
        if not (folder / file).is_file():
            raise MissingFile(f"{folder} holds no {file}, so it is not a PEFT adapter.")
    try:
        config = json.loads((folder / CONFIG).read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"{folder / CONFIG} is not JSON: {error}.") from error
    try:
        tensors = load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise UserError(f"{folder / WEIGHTS} is damaged or cut off: {error}.") from error
    if key := _not_plain(config):
        raise UserError(
            f"{folder / CONFIG} has {key}: {config[key]!r}; only {_PLAIN[key]!r} can be loaded."
        )
    start = str(config.get("init_lora_weights"))
    if start.startswith(("pissa", "olora", "corda", "loftq")):
        raise UserError(
            f"{folder / CONFIG} has init_lora_weights: {start!r}, which changes the base too; "
            "save it as plain LoRA (path_initial_model_for_weight_conversion in PEFT)."
        )
    return config, tensors


def _pattern_value(pattern: Mapping[str, float], name: str, default: float) -> float:
    """The value of the first key that matches the end of a name, as PEFT looks it up."""
    return next((v for k, v in pattern.items() if re.match(rf"(.*\.)?({k})$", name)), default)


@torch.no_grad()
def load_peft(model: nn.Module, folder: str | Path) -> nn.Module:
    """Put a LoRA adapter in PEFT's format onto a model, ready to run or to train on.

    Args:
        model: The base model, without adapters; changed in place, its own parameters frozen.
        folder: Holds ``adapter_config.json`` and ``adapter_model.safetensors``.

    Returns:
        The model.

    Raises:
        MissingFile: If the folder is not an adapter.
        UserError: If the adapter is of another kind than LoRA, damaged, or names layers or shapes
            that the model does not have; or the model has adapters already.
    """
    folder = Path(folder)
    config, tensors = _read(folder)
    if adapter_layers(model):
        raise UserError("the model has adapters already; load onto the bare base model.")
    pairs, others = _sorted(tensors)
    modules = dict(model.named_modules())
    for name, pair in pairs.items():
        _check_place(name, pair, modules.get(name), folder)
    _check_others(others, model, folder)
    model.requires_grad_(False)
    alphas, rslora = config.get("alpha_pattern") or {}, bool(config.get("use_rslora"))
    dropout = config.get("lora_dropout") or 0.0
    for name, pair in pairs.items():
        alpha = _pattern_value(alphas, name, config["lora_alpha"])
        layer = LoRALinear(modules[name], pair["A"].shape[0], alpha, dropout, rslora)
        layer.lora_A.copy_(pair["A"])
        layer.lora_B.copy_(pair["B"])
        model.set_submodule(name, layer.train(model.training))
    if others:
        model.load_state_dict(others, strict=False)
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if name in others:
                parameter.requires_grad_(True)
    return model


def _sorted(
    tensors: Mapping[str, Tensor],
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Each layer's A and B, and the tensors of modules that were trained in full."""
    pairs: dict[str, dict[str, Tensor]] = {}
    others: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        found = _KEY.fullmatch(key)
        if found:
            pairs.setdefault(found["name"], {})[found["side"]] = tensor
        else:
            others[key.removeprefix(PREFIX)] = tensor
    return pairs, others


def _check_others(others: Mapping[str, Tensor], model: nn.Module, folder: Path) -> None:
    places = model.state_dict()
    for name, tensor in others.items():
        if name not in places:
            raise UserError(f"{folder} holds {name}, for which the model has no place.")
        if tensor.shape != places[name].shape:
            raise UserError(
                f"{folder} holds {name} as {tuple(tensor.shape)}, this model has "
                f"{tuple(places[name].shape)}."
            )


def _check_place(
    name: str, pair: Mapping[str, Tensor], module: nn.Module | None, folder: Path
) -> None:
    if not isinstance(module, nn.Linear):
        found = "nothing" if module is None else f"a {type(module).__name__}"
        raise UserError(f"{folder} adapts {name}, where this model has {found} and not a linear.")
    if pair.keys() != {"A", "B"}:
        raise UserError(f"{folder} holds only lora_{next(iter(pair))} of {name}.")
    shape = (pair["B"].shape[0], pair["A"].shape[1])
    if shape != (module.out_features, module.in_features):
        raise UserError(
            f"{folder} adapts {name} as {shape[0]} x {shape[1]}, this model has "
            f"{module.out_features} x {module.in_features}."
        )
