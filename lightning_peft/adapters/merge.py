"""Folding the adapters into the base's weights."""

from __future__ import annotations

import torch
from torch import nn

from lightning_peft.adapters.adapted import AdaptedLayer
from lightning_peft.adapters.attach import adapter_layers
from lightning_peft.adapters.dense import dense_weight, is_quantized, plain_linear, rounds_inputs
from lightning_peft.errors import UserError


def _merged(layer: AdaptedLayer) -> nn.Module:
    base = layer.base
    weight = layer.merged_weight(dense_weight(base))
    if is_quantized(base):
        return plain_linear(base, weight)
    base.weight.data = weight.to(base.weight.dtype)  # type: ignore[union-attr,arg-type]
    return base


def _is_tied(model: nn.Module, layer: AdaptedLayer) -> bool:
    weight = layer.weight
    named = model.named_parameters(remove_duplicate=False)
    return sum(parameter is weight for _, parameter in named) > 1


@torch.no_grad()
def merge(model: nn.Module, dequantize: bool = False) -> nn.Module:
    """Replace each adapted layer by its base with ``W + ΔW``, as it is in eval.

    Args:
        model: The adapted model, changed in place; afterwards it is an ordinary model, so
            ``model.save_pretrained(folder)`` writes an ordinary checkpoint.
        dequantize: Allow quantized linears, adapted or not, to become plain ones in float32.

    Returns:
        The model.

    Raises:
        UserError: If the model has no adapters; if a base is quantized and ``dequantize`` is
            False, or rounds its inputs too, so that no plain linear equals it; if a base shares its
            weight with another module.
    """
    layers = adapter_layers(model)
    if not layers:
        raise UserError("the model has no adapters to merge.")
    for name, layer in layers.items():
        if is_quantized(layer.base) and not dequantize:
            raise UserError(
                f"{name} is a {type(layer.base).__name__}: merging into it would round the change "
                "to its few levels; dequantize=True (--dequantize) makes plain float32 linears."
            )
        if rounds_inputs(layer.base):
            raise UserError(
                f"{name} is a {type(layer.base).__name__}, which rounds its inputs too, so that no "
                "plain linear equals it; export the adapter, and merge it into the base in full "
                "precision."
            )
        if _is_tied(model, layer):
            raise UserError(
                f"{name} shares its weight with another module, which merging would change too; "
                "untie them, or leave it out of target_modules."
            )
    for name, layer in layers.items():
        model.set_submodule(name, _merged(layer))
    rest = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and is_quantized(m)]
    for name in rest:  # half a quantized model could be saved as neither kind
        model.set_submodule(name, plain_linear(model.get_submodule(name)))
    return model
