"""What ``all-linear`` cannot take, and which weights no adapter reaches."""

from __future__ import annotations

from collections import Counter

from torch import nn

from lightning_peft import distributed
from lightning_peft.adapters.adapted import AdaptedLayer
from lightning_peft.adapters.dense import is_quantized

_HEADS = ("score", "classifier")  # of classification models, PEFT's SEQ_CLS_HEAD_NAMES


def output_names(model: nn.Module) -> set[str]:
    """Full names in the output layer or classification head, which ``all-linear`` leaves alone."""
    find = getattr(model, "get_output_embeddings", None)
    head = find() if callable(find) else None
    if head is None:
        head = next((getattr(model, n) for n in _HEADS if hasattr(model, n)), None)
    inside = set(head.modules()) if isinstance(head, nn.Module) else set()
    return {name for name, module in model.named_modules() if module in inside}


def computes_otherwise(linear: nn.Linear) -> bool:
    """Whether a subclass of ``nn.Linear`` has a forward of its own, such as Llama-4's router.

    Quantized linears have one too, and compute what a linear does.
    """
    if type(linear).forward is nn.Linear.forward:
        return False
    return not is_quantized(linear) and not type(linear).__module__.startswith("bitsandbytes")


def left_out(model: nn.Module) -> list[str]:
    """Full names of the linears that ``all-linear`` leaves out for their own forward."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and computes_otherwise(module)
    ]


def unreached(model: nn.Module, outputs: set[str]) -> dict[str, int]:
    """Values of frozen matrices that no adapter changes.

    Args:
        model: The adapted model.
        outputs: Full names in the output layer, which counts neither here nor there; nor do
            embeddings.

    Returns:
        Their number by the last two words of their names, those of most values first.
    """
    adapted = tuple(f"{n}." for n, m in model.named_modules() if isinstance(m, AdaptedLayer))
    beside = {n for n, m in model.named_modules() if isinstance(m, nn.Embedding)} | outputs
    found: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        shape = distributed.shape(parameter)
        inside = name.startswith(adapted) or name.rpartition(".")[0] in beside
        if len(shape) >= 2 and not inside and not parameter.requires_grad:
            parts = [p for p in name.removesuffix(".weight").split(".") if not p.isdigit()]
            found[".".join(parts[-2:])] += shape.numel()
    return dict(found.most_common())
