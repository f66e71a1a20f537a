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
