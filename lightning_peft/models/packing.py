"""Several documents in one row: positions begin anew in each, and none attends to another.

Given positions and no attention mask, transformers (4.53 and newer) reads the documents off the
positions and masks attention block by block, whatever its implementation, sliding windows included.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_peft.errors import UserError


def model_inputs(batch: dict[str, Any]) -> dict[str, Tensor]:
    """What a causal model reads of a batch; packed rows have ``position_ids``.

    Args:
        batch: Tensors (batch, tokens).

    Raises:
        UserError: If rows are packed and the installed transformers would let documents attend to
            one another.
    """
    if "position_ids" not in batch:
        return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    _check_transformers()
    return {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"]}


def one_row(batch: dict[str, Any], config: Any) -> dict[str, Any]:
    """For flash attention, which knows packed documents in a single row only, make it one.

    Args:
        batch: Tensors (batch, tokens); left as it is unless it is packed.
        config: The model's.
    """
    flash = "flash" in str(getattr(config, "_attn_implementation", ""))
    if "position_ids" not in batch or not flash:
        return batch
    wide = ("input_ids", "position_ids", "attention_mask", "labels")
    return {k: v.reshape(1, -1) if k in wide else v for k, v in batch.items()}


def _check_transformers() -> None:
    try:
        from transformers.masking_utils import find_packed_sequence_indices  # noqa: F401
    except ImportError:
        import transformers

        raise UserError(
            f"data.packing needs transformers 4.53 or newer; {transformers.__version__} would let "
            "packed documents attend to one another."
        ) from None
