"""Folding the adapters into the base's weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_peft.adapters.attach import adapter_layers
from lightning_peft.adapters.dense import dense_weight, is_quantized
from lightning_peft.adapters.layer import LoRALinear


def _merged(layer: LoRALinear) -> nn.Module:
    base = layer.base
    weight = layer.merged_weight(dense_weight(base))
    if not is_quantized(base):
        base.weight.data = weight.to(base.weight.dtype)  # type: ignore[union-attr,arg-type]
        return base
    bias: Tensor | None = base.bias  # type: ignore[assignment]
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device=weight.device)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().float(), requires_grad=False)
    return linear


def _is_tied(model: nn.Module, layer: nn.Module) -> bool:
    weight = layer.base.weight  # type: ignore[union-attr]
    named = model.named_parameters(remove_duplicate=False)
    return sum(parameter is weight for _, parameter in named) > 1


@torch.no_grad()
def merge(model: nn.Module, dequantize: bool = False) -> nn.Module:
    """Replace each adapted layer by its base with ``W + ΔW``, as it is in eval.

    Args:
        model: The adapted model, changed in place; afterwards it is an ordinary model, so
            ``model.save_pretrained(folder)`` writes an ordinary checkpoint.
        dequantize: Allow a quantized base to become a plain ``nn.Linear`` in float32.

    Returns:
        The model.

    Raises:
        ValueError: If the model has no adapters, or a base is quantized and ``dequantize`` is
            False.
    """
    layers = adapter_layers(model)
    if not layers:
        raise ValueError("the model has no adapters to merge.")
    for name, layer in layers.items():
        if is_quantized(layer.base) and not dequantize:
            raise ValueError(
                f"{name} is a {type(layer.base).__name__}: merging into it would round the change "
                "to its few levels; pass dequantize=True to get plain float32 linears."
            )
        if _is_tied(model, layer):
            raise ValueError(
                f"{name} shares its weight with another module, which merging would change too; "
                "untie them, or leave it out of target_modules."
            )
    for name, layer in layers.items():
        model.set_submodule(name, _merged(layer))
    return model
