"""PEFT's format, written for every kind of layer. :mod:`.peft_reading` reads plain LoRA back.

The factors are written in eval form, gate folded into B; a layer whose change is no plain LoRA says
itself what PEFT stores for it (:meth:`AdaptedLayer.peft`). Layers that lost all components
are left out (PEFT knows no rank 0), and a Parameter that several layers share is written once for
each.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_peft.adapters.adapted import PeftForm
from lightning_peft.adapters.attach import adapter_layers, trained_modules
from lightning_peft.adapters.compiled import plain_name, uncompiled
from lightning_peft.adapters.finite import refuse_broken
from lightning_peft.adapters.peft_config import CONFIG
from lightning_peft.adapters.peft_tensors import PREFIX, WEIGHTS
from lightning_peft.atomic import write_atomically, write_text
from lightning_peft.errors import UserError

_TASK_TYPES = {"ForCausalLM": "CAUSAL_LM", "ForSequenceClassification": "SEQ_CLS"}


def alpha_of(scaling: float, rank: int) -> int | float:
    """The shortest alpha whose share of a rank is a scaling, so that it comes back as it was.

    Args:
        scaling: Of a layer.
        rank: Of the same.

    Returns:
        ``scaling · rank``, an integer where that is one.
    """
    product = scaling * rank
    digits = [round(product, n) for n in range(17)]
    found = next((value for value in digits if value / rank == scaling), product)
    return int(found) if found == int(found) else found


def _exactly(name: str) -> str:
    """A pattern key that PEFT matches with this full name only, not with another's end."""
    return "^" + re.escape(name)


def _own_names(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that the base has too, by full name; what adapters are made of is left out."""
    inside = tuple(f"{name}." for name in adapter_layers(model))
    modules = model.named_modules(remove_duplicate=False)
    found = {plain_name(n): m for n, m in modules if n and not n.startswith(inside)}
    return {name: module for name, module in found.items() if name}


def _target_modules(model: nn.Module, names: list[str]) -> list[str] | str:
    """Full names, as a regex only where one of them is also the end of another module's name.

    PEFT takes a list entry as the end of a name, so a top-level layer ``q`` would match every
    ``….q``.
    """
    ends = set(names)
    parts = [name.split(".") for name in _own_names(model)]
    if any(".".join(p[i:]) in ends for p in parts for i in range(1, len(p))):
        return "|".join(re.escape(name) for name in names)
    return names


def _lora_config(forms: Mapping[str, PeftForm]) -> dict[str, Any]:
    for name, form in forms.items():
        if not 0 < form.scaling < math.inf:
            raise UserError(
                f"{name} has the scaling {form.scaling}, which must be a finite number above zero."
            )
    ranks = {name: form.tensors["lora_A.weight"].shape[0] for name, form in forms.items()}
    # alpha / rank is what PEFT multiplies by; ours keeps the scaling it had at the initial rank.
    alphas = {name: alpha_of(form.scaling, ranks[name]) for name, form in forms.items()}
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


def _own_config(forms: Mapping[str, PeftForm]) -> dict[str, Any]:
    """What the layers say themselves, with PEFT's patterns where their ranks differ."""
    config = dict(next(iter(forms.values())).config)
    for key, pattern in (("r", "rank_pattern"), ("alpha", "alpha_pattern")):
        if key in config:
            values = {name: form.config[key] for name, form in forms.items()}
            config[key] = Counter(values.values()).most_common(1)[0][0]
            others = {_exactly(n): value for n, value in values.items() if value != config[key]}
            config |= {pattern: others} if others else {}
    return config


def _config(model: nn.Module, forms: Mapping[str, PeftForm], saved: list[str]) -> dict[str, Any]:
    # Which of its model classes PEFT wraps the base in; one that classifies brings its head along.
    task = next((t for end, t in _TASK_TYPES.items() if type(model).__name__.endswith(end)), None)
    own = _own_config(forms)
    kind = own.get("peft_type", "LORA")
    return {
        "peft_type": kind,
        "task_type": task,
        "base_model_name_or_path": getattr(model, "name_or_path", None) or None,
        "inference_mode": True,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": _target_modules(model, list(forms)),
        "modules_to_save": saved or None,
        **(_lora_config(forms) if kind == "LORA" else {}),
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


def peft_forms(model: nn.Module) -> dict[str, PeftForm]:
    """How PEFT stores each layer that is not empty, by full name.

    Args:
        model: The adapted model.

    Raises:
        UserError: As :func:`save_peft`.
    """
    layers = {name: layer for name, layer in adapter_layers(model).items() if layer.rank != 0}
    if not layers:
        raise UserError("the model has no adapter of rank 1 or more, so there is nothing to save.")
    kinds = {type(layer) for layer in layers.values()}
    if len(kinds) > 1:
        names = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise UserError(f"PEFT's format holds layers of one kind, the model has {names}.")
    reason = without_peft(model)
    if reason is not None:
        raise UserError(
            f"{reason}, so there is no adapter in its format; merge it instead "
            "(lightning_peft.merge, lightning-peft export --merge)."
        )
    forms = {plain_name(name): layer.peft() for name, layer in layers.items()}
    return {name: form for name, form in forms.items() if form is not None}


def without_peft(model: nn.Module) -> str | None:
    """Why a model's adapters cannot be written in PEFT's format; None where they can.

    Args:
        model: The adapted model.
    """
    for layer in adapter_layers(model).values():
        if layer.rank == 0:
            continue
        if layer.resized:
            return "PEFT needs a stored base of the same sizes, and this one was pruned"
        if layer.peft() is None:
            return f"PEFT has no form for {type(layer).__name__}"
    return None


def _gather(
    model: nn.Module,
) -> tuple[dict[str, PeftForm], dict[str, Tensor], dict[str, nn.Module]]:
    """Each layer's form, all tensors by their names in PEFT, and modules that train in full."""
    forms = peft_forms(model)
    shared = next(iter(forms.values())).shared
    tensors = {f"base_model.{key}": value for key, value in shared.items()}
    for name, form in forms.items():
        tensors |= {f"{PREFIX}{name}.{key}": value for key, value in form.tensors.items()}
    saved = _saved(model)
    for name, module in saved.items():
        tensors |= {f"{PREFIX}{name}.{key}": value for key, value in module.state_dict().items()}
    return forms, tensors, saved


def _saved(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that train in full, and those that PEFT takes for one of them.

    It reads ``modules_to_save`` as ends of names, with or without a dot before them, and asks for
    the tensors of every module that it finds.
    """
    saved = {plain_name(name): module for name, module in trained_modules(model).items()}
    layers = {plain_name(name) for name in adapter_layers(model)}
    taken = {
        other: (name, module)
        for other, module in _own_names(model).items()
        for name in saved
        if other.endswith(name) and other not in saved
    }
    for other, (name, _) in taken.items():
        adapted = [layer for layer in layers if f"{layer}.".startswith(f"{other}.")]
        if adapted or other.startswith(f"{name}."):
            raise UserError(
                f"PEFT knows modules that train in full by the ends of their names, so that {name} "
                f"is {other} too, {'which is adapted' if adapted else 'a part of it'}; rename one "
                "of them, or merge the adapter instead (lightning-peft export --merge)."
            )
    others = {other: module for other, (_, module) in taken.items() if module.state_dict()}
    return saved | others


def save_peft(model: nn.Module, folder: str | Path) -> Path:
    """Write the adapters of a model in PEFT's format.

    Args:
        model: The adapted model.
        folder: Where ``adapter_config.json`` and ``adapter_model.safetensors`` go; made if absent.

    Returns:
        The folder.

    Raises:
        UserError: If the model has no adapters, or every one of them has rank 0, or they are of
            kinds that PEFT cannot hold in one adapter, or of a form that it does not know, or their
            base was pruned; or a tensor holds NaN or infinite values.
    """
    model = uncompiled(model)
    forms, tensors, saved = _gather(model)
    refuse_broken(tensors, "the adapter")
    # Full names, since PEFT takes the end of any name: "norm" would be every "….input_layernorm"
    # too.
    config = _config(model, forms, sorted(saved))
    # safetensors refuses storage that two names share.
    tensors = {key: value.detach().cpu().clone().contiguous() for key, value in tensors.items()}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(
        folder / WEIGHTS, lambda path: save_file(tensors, path, metadata={"format": "pt"})
    )
    write_text(folder / CONFIG, json.dumps(config, indent=2) + "\n")
    return folder
