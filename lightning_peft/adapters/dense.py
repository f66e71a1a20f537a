"""The weight of any linear, quantized ones too, as a plain matrix."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def is_quantized(linear: nn.Module) -> bool:
    """Whether a linear stores its weight in another form than (d_out, d_in) floats."""
    weight: Tensor = linear.weight  # type: ignore[assignment]
    return not weight.is_floating_point() or weight.shape != (
        linear.out_features,
        linear.in_features,
    )


def rounds_inputs(linear: nn.Module) -> bool:
    """Whether a quantized linear rounds its inputs too (LLM.int8), so that no matrix equals it."""
    return linear.weight.dtype == torch.int8  # type: ignore[union-attr]


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


@torch.no_grad()
def plain_linear(linear: nn.Module, weight: Tensor | None = None) -> nn.Linear:
    """A frozen ``nn.Linear`` in the place of a quantized one.

    Args:
        linear: The quantized linear.
        weight: Its new weight, (d_out, d_in); its own, dense, when None.

    Returns:
        The linear, in float32 at least.
    """
    weight = dense_weight(linear) if weight is None else weight
    bias: Tensor | None = linear.bias  # type: ignore[assignment]
    plain = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device=weight.device)
    plain.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        plain.bias = nn.Parameter(bias.detach().float(), requires_grad=False)
    return plain
