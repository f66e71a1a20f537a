"""Reading an adapter in PEFT's format, where it is plain LoRA.

Configuration (:mod:`.peft_config`) and tensors (:mod:`.peft_tensors`) must say the same of the same
model. What PEFT's own loader passes over, such as a layer that is named and has no tensors, is an
error here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_peft.adapters.attach import adapter_layers
from lightning_peft.adapters.by_name import ByName
from lightning_peft.adapters.json_file import read_json
from lightning_peft.adapters.layer import LoRALinear
from lightning_peft.adapters.peft_config import (
    CONFIG,
    PeftConfig,
    not_plain,
    read_config,
)
from lightning_peft.adapters.peft_targets import HEADS, saved_by, targets_of
from lightning_peft.adapters.peft_tensors import WEIGHTS, Tensors, as_stored, read_tensors
from lightning_peft.errors import UserError, named, shown


def unreadable(folder: str | Path) -> str | None:
    """The key of an adapter's configuration by which it is no plain LoRA; None where it is one."""
    return not_plain(read_json(Path(folder) / CONFIG))


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
        UserError: If the adapter is of another kind than LoRA, damaged, holds numbers that are
            none, names layers or shapes that the model does not have, or says one thing in its
            configuration and another by its tensors; or the model has adapters already.
    """
    folder = Path(folder)
    config, tensors = read_config(folder), read_tensors(folder)
    if adapter_layers(model):
        raise UserError("the model has adapters already; load onto the bare base model.")
    modules = dict(model.named_modules())
    for name, pair in tensors.pairs.items():
        _check_place(name, pair, modules.get(name), folder)
    _check_ranks(config, tensors)
    _check_others(tensors, model, folder)
    _check_targets(config, tensors, model)
    _check_saved(config, tensors, model)
    alphas = ByName(f"{config.path} has alpha_pattern", config.alpha_pattern)
    scaled = {name: alphas.of(name, config.lora_alpha) for name in tensors.pairs}
    model.load_state_dict(tensors.bases, strict=False)
    model.requires_grad_(False)
    for name, pair in tensors.pairs.items():
        layer = LoRALinear(
            modules[name],
            pair["A"].shape[0],
            scaled[name],
            config.lora_dropout,
            config.use_rslora,
        )
        layer.lora_A.copy_(pair["A"])
        layer.lora_B.copy_(pair["B"])
        model.set_submodule(name, layer.train(model.training))
    if tensors.others:
        model.load_state_dict(tensors.others, strict=False)
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if name in tensors.others:
                parameter.requires_grad_(True)
    return model


def _check_place(
    name: str, pair: Mapping[str, Tensor], module: nn.Module | None, folder: Path
) -> None:
    if not isinstance(module, nn.Linear):
        found = "nothing" if module is None else f"a {type(module).__name__}"
        raise UserError(
            f"{folder} adapts {named(name)}, where this model has {found} and not a linear."
        )
    shape = (pair["B"].shape[0], pair["A"].shape[1])
    if shape != (module.out_features, module.in_features):
        raise UserError(
            f"{folder} adapts {name} as {shape[0]} x {shape[1]}, this model has "
            f"{module.out_features} x {module.in_features}."
        )
    for side, tensor in pair.items():
        stored = torch.float64 if module.weight.dtype == torch.float64 else torch.float32
        if what := as_stored(tensor, stored):
            raise UserError(f"{folder} holds lora_{side} of {name} with {what} in {stored}.")


def _check_ranks(config: PeftConfig, tensors: Tensors) -> None:
    ranks = ByName(f"{config.path} has rank_pattern", config.rank_pattern)
    for name, pair in tensors.pairs.items():
        given, found = ranks.of(name, None), pair["A"].shape[0]
        key = "r" if given is None else "rank_pattern"
        if found != (config.r if given is None else given):
            raise UserError(
                f"{config.path} gives {name} rank {given or config.r} ({key}), but {WEIGHTS} holds "
                f"rank {found}; the two files are not of one adapter, or {key} is wrong."
            )


def _check_others(tensors: Tensors, model: nn.Module, folder: Path) -> None:
    """Refuse tensors that have no place, or another shape or kind of numbers there."""
    places = model.state_dict()
    for name, tensor in {**tensors.others, **tensors.bases}.items():
        if name not in places:
            raise UserError(f"{folder} holds {named(name)}, for which the model has no place.")
        place = places[name]
        if tensor.shape != place.shape:
            raise UserError(
                f"{folder} holds {name} as {tuple(tensor.shape)}, this model has "
                f"{tuple(place.shape)}."
            )
        same = tensor.dtype == place.dtype
        if not same and not (tensor.is_floating_point() and place.is_floating_point()):
            raise UserError(f"{folder} holds {name} in {tensor.dtype}, this model {place.dtype}.")
        if what := as_stored(tensor, place.dtype):
            raise UserError(
                f"{folder} holds {name} with values that are {what} in this model's {place.dtype}."
            )
    _check_tied(tensors, model, folder)


def _check_tied(tensors: Tensors, model: nn.Module, folder: Path) -> None:
    """Refuse a tensor that would change a parameter under another name too, as PEFT's would not."""
    names: dict[int, list[str]] = {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in parameters.items():
        names.setdefault(id(parameter), []).append(name)
    held = {**tensors.others, **tensors.bases}
    for name, tensor in held.items():
        tied = names.get(id(parameters.get(name)), [])
        now = parameters[name].detach() if tied else None
        for other in tied:
            found = held.get(other, now)
            assert now is not None
            assert found is not None
            if not torch.equal(found.to(now), tensor.to(now)):
                raise UserError(
                    f"{folder} holds {name}, which this model has in common with {other}, where it "
                    "would change too; load the model with tie_word_embeddings=False."
                )


def _check_targets(config: PeftConfig, tensors: Tensors, model: nn.Module) -> None:
    """Refuse a layer that is named without tensors, and tensors of a layer that is not named."""
    targets = targets_of(config, model)
    for name, module in targets.items():
        if name not in tensors.pairs:
            kind = "" if isinstance(module, nn.Linear) else f", a {type(module).__name__}"
            raise UserError(
                f"{config.path} has {name}{kind} among its target_modules, but {WEIGHTS} holds no "
                "lora_A and lora_B of it; the two files are not of one adapter, or it is to be "
                "left out of target_modules."
            )
    for name in tensors.pairs:
        if name not in targets:
            raise UserError(
                f"{tensors.path} adapts {name}, which target_modules of {CONFIG} does not name; "
                "the two files are not of one adapter, or it is to be named there."
            )


def _check_saved(config: PeftConfig, tensors: Tensors, model: nn.Module) -> None:
    """Refuse a module that is named without tensors, and tensors of one that is not named."""
    named_in: set[str] = set()
    for entry, modules in saved_by(config, model):
        if not modules and entry not in HEADS:
            raise UserError(
                f"{config.path} has modules_to_save: {shown(entry)}, which is the end of no module "
                "of this model; give the model that the adapter was trained on."
            )
        for name, module in modules.items():
            expected = {f"{name}.{key}" for key in module.state_dict()}
            if missing := sorted(expected - tensors.others.keys()):
                raise UserError(
                    f"{config.path} has modules_to_save: {shown(entry)}, but {WEIGHTS} holds no "
                    f"{missing[0]}; the two files are not of one adapter, or it is to be left out."
                )
            named_in |= expected
    for name in tensors.others:
        if name not in named_in and not name.startswith(_embeddings(model)):
            raise UserError(
                f"{tensors.path} holds {name}, which modules_to_save of {CONFIG} does not name; "
                "the two files are not of one adapter, or it is to be named there."
            )


def _embeddings(model: nn.Module) -> tuple[str, ...]:
    """What names of embeddings begin with, which PEFT may save without naming them."""
    held = []
    for side in ("input", "output"):
        with contextlib.suppress(AttributeError, NotImplementedError):  # a model without any
            held.append(getattr(model, f"get_{side}_embeddings")())
    return tuple(f"{n}." for n, m in model.named_modules() if n and any(m is h for h in held))
