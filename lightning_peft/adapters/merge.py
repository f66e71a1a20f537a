"""Folding the adapters into the base's weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_peft.adapters.attach import adapter_layers


def is_quantized(linear: nn.Module) -> bool:
    """Whether a linear stores its weight in another form than (d_out, d_in) floats."""
    weight: Tensor = linear.weight  # type: ignore[assignment]
    return not weight.is_floating_point() or weight.shape != (
        linear.out_features,
        linear.in_features,
    )


@torch.no_grad()
def dense_weight(linear: nn.Module) -> Tensor:
    """The weight of any linear as a plain matrix, (d_out, d_in), float32 at least.

    A quantized weight is read by sending the identity through the layer, which needs no knowledge
    of its format.
    """
    weight: Tensor = linear.weight  # type: ignore[assignment]
    if not is_quantized(linear):
        return weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    eye = torch.eye(int(linear.in_features), device=weight.device)  # type: ignore[arg-type]
    bias: Tensor | None = linear.bias  # type: ignore[assignment]
    out = linear(eye).float()
    return (out if bias is None else out - bias.float()).T.contiguous()


def _merged(base: nn.Module, delta: Tensor) -> nn.Module:
    weight = dense_weight(base) + delta.to(torch.float32 if is_quantized(base) else delta.dtype)
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
        model.set_submodule(name, _merged(layer.base, layer.delta_weight()))
    return model
