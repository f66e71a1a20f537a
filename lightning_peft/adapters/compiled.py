"""``torch.compile`` of an adapted model whose ranks change while it trains, and its names."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

_WRAPPED = "_orig_mod"


def uncompiled(model: nn.Module) -> nn.Module:
    """What ``torch.compile(model)`` has wrapped; the model itself where it is not wrapped."""
    return getattr(model, _WRAPPED, model)


def plain_name(name: str) -> str:
    """A full name without the wrappers that ``torch.compile`` puts around parts of a model."""
    return ".".join(part for part in name.split(".") if part != _WRAPPED)


def compile_model(model: nn.Module, **options: Any) -> nn.Module:
    """Compile an adapted model so that a removal of components does not compile it anew each time.

    By itself torch compiles anew for every shape of a parameter and every number that a module
    holds, and gives up after eight. Two of its options, which hold for the whole process, let it
    treat the rank as unknown once it has seen two: the model is then compiled twice, and a third
    time where a rank comes down to one.

    Args:
        model: The adapted model.
        options: Of ``torch.compile``.

    Returns:
        What ``torch.compile`` returns.
    """
    import torch._dynamo as dynamo

    dynamo.config.force_parameter_static_shapes = False
    dynamo.config.allow_unspec_int_on_nn_module = True
    return torch.compile(model, **options)  # type: ignore[return-value]
