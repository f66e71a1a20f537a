"""QLoRA (Dettmers et al. 2023, https://arxiv.org/abs/2305.14314): a base in a few bits.

A property of the base and not a method: every adapter stands over it as over any other linear. The
weights of all linears but the output layer or head are stored in 4 or 8 bits by ``bitsandbytes``;
embeddings, norms and heads keep the base's dtype, in which products are computed too.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from lightning_peft.errors import UserError

QUANTIZATIONS = ("nf4", "int8")


def check_quantization(quantization: str | None) -> None:
    """Refuse a quantization that is none, or whose packages are absent, before a model is loaded.

    Args:
        quantization: ``nf4``, ``int8`` or None.

    Raises:
        UserError: As said.
    """
    if quantization is None:
        return
    if quantization not in QUANTIZATIONS:
        raise UserError(
            f"model.quantization must be null or one of {', '.join(QUANTIZATIONS)}, got "
            f"{quantization!r}."
        )
    for package in ("bitsandbytes", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise UserError(
                f"model.quantization: {quantization} needs {package}, which is not installed: "
                "pip install 'lightning-peft[bitsandbytes]'."
            )


def quantized(
    quantization: str | None,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    heads: list[str] | None = None,
) -> dict[str, Any]:
    """What ``from_pretrained`` takes to load a quantized base; nothing for a plain one.

    Args:
        quantization: ``nf4`` (4-bit normal floats with double quantization, as in the paper),
            ``int8`` or None.
        dtype: In which products are computed.
        device: Where the weights are quantized and stay.
        heads: Names of modules that are left as they are; the output layer when None.

    Returns:
        Keyword arguments.
    """
    if quantization is None:
        return {}
    check_quantization(quantization)
    from transformers import BitsAndBytesConfig

    kinds: dict[str, dict[str, Any]] = {
        "nf4": {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": dtype,
        },
        "int8": {"load_in_8bit": True},
    }
    config = BitsAndBytesConfig(**kinds[quantization], llm_int8_skip_modules=heads)
    return {"quantization_config": config, "device_map": {"": device}}


def keep_exact(model: Any) -> None:
    """Keep 4-bit linears from changing to a form of fewer digits at their first evaluation.

    On CPUs with AVX512-BF16, bitsandbytes repacks a weight in eval mode, computes in bfloat16 from
    then on, and in a form that has no backward: training after a validation would go on without the
    gradients that come through these layers.

    Args:
        model: The model; changed in place.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def forget_quantization(model: Any) -> None:
    """Let a model whose linears have all become plain be saved as an ordinary one.

    Args:
        model: As transformers loaded it; changed in place.
    """
    for owner, name in ((model.config, "quantization_config"), (model, "hf_quantizer")):
        if hasattr(owner, name):
            delattr(owner, name)
    for name in ("is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit"):
        if getattr(model, name, False):
            setattr(model, name, False)
