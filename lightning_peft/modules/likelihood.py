"""How likely a model finds a test's references: a loss per token beside what it generates.

A corpus score of generated texts differs much between seeds. The loss on the references differs
little, so it tells methods apart with fewer runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_peft import distributed
from lightning_peft.models.loss import row_losses
from lightning_peft.modules.window import Batch


def reference_losses(
    model: Any, batches: Sequence[tuple[Sequence[int], Batch]], records: int, device: torch.device
) -> list[dict[str, float | int]]:
    """The loss of each record's references.

    Args:
        model: A causal language model of transformers.
        batches: Of prompts with references: the record of each row, and the rows as in training.
        records: How many there are.
        device: Of the model.

    Returns:
        For each record ``loss``, in nats, summed over the tokens of all its references, and
        ``target_tokens``, how many those are.
    """
    loss = torch.zeros(records, dtype=torch.float64)
    count = torch.zeros(records, dtype=torch.int64)
    turns = len(batches)
    if any(map(distributed.is_cut, model.parameters())):
        turns = distributed.largest(turns)  # all go along, since all gather the model at once
    for turn in range(turns):
        owners, batch = batches[min(turn, len(batches) - 1)]
        inputs = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        sums, counts = row_losses(model, inputs)
        if turn < len(batches):
            loss.index_add_(0, torch.tensor(owners), sums.cpu().double())
            count.index_add_(0, torch.tensor(owners), counts.cpu())
    pairs = zip(loss.tolist(), count.tolist(), strict=True)
    return [{"loss": total, "target_tokens": tokens} for total, tokens in pairs]
