"""Bytes of tensors, and of a base that does not train."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

# Bytes of a weight: nf4 with double quantization (4 bits, 8 for each 64 values, 32 for each 256 of
# these), int8 (8 bits, 32 for each row, which hardly count).
QUANTIZED = {"nf4": 0.5 + 1 / 64 + 4 / (64 * 256), "int8": 1.0}


def nbytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors, storage that several share once."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def value_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors' own values; a meta tensor may be a view where the real one is a copy."""
    return sum({id(t): t.numel() * t.element_size() for t in tensors}.values())


def base_bytes(model: nn.Module, quantization: str | None) -> int:
    """Bytes of what does not train; linears in few bits where the base is quantized.

    Args:
        model: The adapted model; its output layer is never quantized.
        quantization: A key of :data:`QUANTIZED`, or None.
    """
    frozen = [p for p in model.parameters() if not p.requires_grad]
    total = nbytes([*frozen, *model.buffers()])
    if quantization is None:
        return total
    output = getattr(model, "get_output_embeddings", lambda: None)()
    weights = [
        m.weight
        for m in model.modules()
        if isinstance(m, nn.Linear) and m is not output and not m.weight.requires_grad
    ]
    return (
        total - nbytes(weights) + round(sum(w.numel() for w in weights) * QUANTIZED[quantization])
    )
