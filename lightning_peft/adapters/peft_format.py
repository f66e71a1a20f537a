"""PEFT's format, written for every kind of layer and read where it is plain LoRA.

The factors are written in eval form, gate folded into B; a layer whose change is no plain LoRA says
itself what PEFT stores for it (:meth:`LoRALinear.peft_tensors`). Layers that lost all components
are left out (PEFT knows no rank 0), and a Parameter that several layers share is written once for
each.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_peft.adapters.attach import adapter_layers, replace_linears, trained_modules
from lightning_peft.adapters.layer import LoRALinear
from lightning_peft.atomic import write_atomically
from lightning_peft.errors import MissingFile, UserError

PREFIX = "base_model.model."
_TASK_TYPES = {"ForCausalLM": "CAUSAL_LM", "ForSequenceClassification": "SEQ_CLS"}
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_KEY = re.compile(re.escape(PREFIX) + r"(?P<name>.+)\.lora_(?P<side>[AB])\.weight")


def _number(value: float) -> int | float:
    """An integral alpha as an integer, as everyone writes it."""
    return int(round(value)) if abs(value - round(value)) < 1e-9 else value


def _exactly(name: str) -> str:
    """A pattern key that PEFT matches with this full name only, not with another's end."""
    return "^" + re.escape(name)


def _target_modules(model: nn.Module, names: list[str]) -> list[str] | str:
    """Full names, as a regex only where one of them is also the end of another linear's name.

    PEFT takes a list entry as the end of a name, so a top-level layer ``q`` would match every
    ``….q``.
    """
    bases = {layer.base for layer in adapter_layers(model).values()}
    linears = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    others = [name for name, linear in linears if linear not in bases]
    if any(other.endswith(f".{name}") for name in names for other in others + names):
        return "|".join(re.escape(name) for name in names)
    return names


def _lora_config(
    layers: Mapping[str, LoRALinear], tensors: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, Any]:
    ranks = {name: tensors[name]["lora_A.weight"].shape[0] for name in layers}
    # alpha / rank is what PEFT multiplies by; ours keeps the scaling it had at the initial rank.
    alphas = {name: _number(layer.scaling * ranks[name]) for name, layer in layers.items()}
    r = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas[n] for n, k in ranks.items() if k == r).most_common(1)[0][0]
    return {
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "rank_pattern": {_exactly(n): k for n, k in ranks.items() if k != r},
        "alpha_pattern": {_exactly(n): a for n, a in alphas.items() if a != alpha},
    }


def _config(
    model: nn.Module,
    layers: Mapping[str, LoRALinear],
    tensors: Mapping[str, Mapping[str, Tensor]],
    saved: list[str],
) -> dict[str, Any]:
    # Which of its model classes PEFT wraps the base in; one that classifies brings its head along.
    task = next((t for end, t in _TASK_TYPES.items() if type(model).__name__.endswith(end)), None)
    own = next(iter(layers.values())).peft_config(layers)
    kind = own.get("peft_type", "LORA")
    return {
        "peft_type": kind,
        "task_type": task,
        "base_model_name_or_path": getattr(model, "name_or_path", None) or None,
        "inference_mode": True,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": _target_modules(model, list(layers)),
        "modules_to_save": saved or None,
        **(_lora_config(layers, tensors) if kind == "LORA" else {}),
        **own,
    }


def peft_state(model: nn.Module) -> dict[str, Tensor]:
    """What :func:`save_peft` writes, under the names that PEFT looks for; works on meta tensors.

    Args:
        model: The adapted model.

    Raises:
        UserError: As :func:`save_peft`.
    """
    return _gather(model)[1]


def _gather(
    model: nn.Module,
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor], dict[str, nn.Module]]:
    """Each layer's tensors, all tensors by their names in PEFT, and modules that train in full."""
    layers = {name: layer for name, layer in adapter_layers(model).items() if layer.rank > 0}
    if not layers:
        raise UserError("the model has no adapter of rank 1 or more, so there is nothing to save.")
    kinds = {type(layer) for layer in layers.values()}
    if len(kinds) > 1:
        names = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise UserError(f"PEFT's format holds layers of one kind, the model has {names}.")
    own = {name: layer.peft_tensors() for name, layer in layers.items()}
    shared = kinds.pop().peft_shared(layers)
    tensors = {f"base_model.{key}": value for key, value in shared.items()}
    for name, parts in own.items():
        tensors |= {f"{PREFIX}{name}.{key}": value for key, value in parts.items()}
    saved = trained_modules(model)
    for name, module in saved.items():
        tensors |= {f"{PREFIX}{name}.{key}": value for key, value in module.state_dict().items()}
    return own, tensors, saved


def save_peft(model: nn.Module, folder: str | Path) -> Path:
    """Write the adapters of a model in PEFT's format.

    Args:
        model: The adapted model.
        folder: Where ``adapter_config.json`` and ``adapter_model.safetensors`` go; made if absent.

    Returns:
        The folder.

    Raises:
        UserError: If the model has no adapters, or every one of them has rank 0, or they are of
            kinds that PEFT cannot hold in one adapter.
    """
    own, tensors, saved = _gather(model)
    layers = {name: adapter_layers(model)[name] for name in own}
    # safetensors refuses storage that two names share.
    tensors = {key: value.detach().cpu().clone().contiguous() for key, value in tensors.items()}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(
        folder / WEIGHTS, lambda path: save_file(tensors, path, metadata={"format": "pt"})
    )
    # Full names, since PEFT takes the end of any name: "norm" would be every "….input_layernorm"
    # too.
    config = _config(model, layers, own, sorted(saved))
    write_atomically(
        folder / CONFIG, lambda path: path.write_text(json.dumps(config, indent=2) + "\n")
    )
    return folder


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
    modules = dict(model.named_modules())
    pairs: dict[str, dict[str, Tensor]] = {}
    others: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        found = _KEY.fullmatch(key)
        if found:
            pairs.setdefault(found["name"], {})[found["side"]] = tensor
        else:
            others[key.removeprefix(PREFIX)] = tensor
    for name, pair in pairs.items():
        _check_place(name, pair, modules.get(name), folder)
    places = model.state_dict()
    for name, tensor in others.items():
        if name not in places:
            raise UserError(f"{folder} holds {name}, for which the model has no place.")
        if tensor.shape != places[name].shape:
            raise UserError(
                f"{folder} holds {name} as {tuple(tensor.shape)}, this model has "
                f"{tuple(places[name].shape)}."
            )
    model.requires_grad_(False)
    alphas, rslora = config.get("alpha_pattern") or {}, bool(config.get("use_rslora"))
    for name, pair in pairs.items():
        rank, alpha = pair["A"].shape[0], _pattern_value(alphas, name, config["lora_alpha"])
        made = replace_linears(
            model,
            [name],
            lambda base, rank=rank, alpha=alpha: LoRALinear(  # type: ignore[misc]
                base, rank, alpha, config.get("lora_dropout") or 0.0, rslora
            ),
        )
        made[name].lora_A.copy_(pair["A"])
        made[name].lora_B.copy_(pair["B"])
    if others:
        model.load_state_dict(others, strict=False)
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if name in others:
                parameter.requires_grad_(True)
    return model


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
