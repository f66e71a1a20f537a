"""How likely a model finds a test's references: a loss per token beside what it generates.

A corpus score of generated texts differs much between seeds. The loss on the references differs
little, so it tells methods apart with fewer runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, distributed

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
    # A process with fewer batches goes along, since a sharded model is gathered by all at once.
    for turn in range(_most(len(batches), device)):
        owners, batch = batches[min(turn, len(batches) - 1)]
        inputs = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        sums, counts = row_losses(model, inputs)
        if turn < len(batches):
            loss.index_add_(0, torch.tensor(owners), sums.cpu().double())
            count.index_add_(0, torch.tensor(owners), counts.cpu())
    pairs = zip(loss.tolist(), count.tolist(), strict=True)
    return [{"loss": total, "target_tokens": tokens} for total, tokens in pairs]


def _most(number: int, device: torch.device) -> int:
    """The largest of all processes' numbers."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return number
    most = torch.tensor(number, device=device)
    distributed.all_reduce(most, distributed.ReduceOp.MAX)
    return int(most)
