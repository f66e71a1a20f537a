"""Liger's kernels for a base on a GPU (https://github.com/linkedin/Liger-Kernel).

RoPE, RMSNorm and the product inside SwiGLU run in one kernel each. The linears stay, so that
adapters stand over them as ever, and so does the loss, which is :mod:`lightning_peft.models.loss`.

Not tried on a GPU: what the tests hold is which kernels are asked for, and that adapters stand.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from lightning_peft.errors import UserError

KERNELS = {
    "rope": True,
    "rms_norm": True,
    "geglu": False,
    # Its losses would replace the model's forward.
    "cross_entropy": False,
    "fused_linear_cross_entropy": False,
}


def check_liger(device: torch.device | str) -> None:
    """Refuse Liger's kernels where they cannot run, before a model is loaded.

    Args:
        device: Where the model will be.

    Raises:
        UserError: If that is a CPU, or the package is not installed.
    """
    if torch.device(device).type == "cpu":
        raise UserError(
            "model.liger: Liger's kernels run on GPUs, and this run is on the CPU; set it to false."
        )
    if importlib.util.find_spec("liger_kernel") is None:
        raise UserError(
            "model.liger needs liger-kernel, which is not installed: "
            "pip install 'lightning-peft[liger]'."
        )


def apply_liger(model: Any) -> None:
    """Have a model of transformers compute with Liger's kernels.

    Some of them are set for the model's class, so for every model of it that the process makes.

    Args:
        model: Without adapters yet; changed in place.

    Raises:
        UserError: If Liger has none for this type of model.
    """
    from liger_kernel.transformers import _apply_liger_kernel_to_instance
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    kind = model.config.model_type
    if kind not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise UserError(
            f"model.liger: Liger has no kernels for a model of the type {kind}; set it to false."
        )
    # Which Liger takes for granted where it patches a model that is there already.
    swiglu = getattr(model.config, "hidden_act", None) in ("silu", "swish")
    _apply_liger_kernel_to_instance(model=model, swiglu=swiglu, **KERNELS)
