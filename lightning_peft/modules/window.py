"""The accumulation window: the micro-batches, on all processes, that one optimizer step is made of.

How the loss is scaled, from the loader to the gradient (this is the one place that says it):

A step should follow the gradient of the mean loss over all *targets* of its window, tokens or
records, however they are spread over micro-batches and processes.

1. The loader counts. :class:`~lightning_peft.datamodules.loading.loader.ResumableDataLoader` puts
   the number of targets of the whole window, over all its micro-batches and all processes, into
   each of its batches under the key ``num_target_tokens``. A short last window counts what it has.
2. The module divides. The summed loss of a micro-batch, divided by that number, is the
   micro-batch's *share*; over the window the shares sum to the mean that is wanted.
3. Lightning divides each loss by ``accumulate_grad_batches``, in a short window too, and the engine
   averages gradients over processes. Neither knows of targets. So the share is multiplied by both
   numbers beforehand, which leaves the sum of the shares.

A data module that counts nothing is taken to have equal numbers of targets in all micro-batches.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lightning_peft import distributed
from lightning_peft.errors import UserError
from lightning_peft.runs import step_of

Batch = dict[str, Any]


class Window:
    """Loss and tokens since the last optimizer step, on this process.

    Attributes:
        loss: Sum of the micro-batches' shares, without the strategy's penalty.
        tokens: How many the model has read.
    """

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Begin with nothing, now."""
        self.loss: Any = 0.0
        self.tokens: Any = 0
        self._since = time.perf_counter()

    def add(
        self,
        batch: Batch,
        total: Tensor,
        count: Tensor,
        penalty: Tensor | float,
        accumulate: int,
        processes: int,
    ) -> Tensor:
        """Take a micro-batch into the window; the head of this file says why it is scaled so.

        Args:
            batch: With ``attention_mask`` (batch, tokens), and ``num_target_tokens`` if its loader
                counts.
            total: Sum of the loss over the batch's targets, a scalar.
            count: How many these are, a scalar.
            penalty: What the strategy adds to the loss of each step.
            accumulate: Micro-batches of a window, by which Lightning divides.
            processes: Over which the engine averages.

        Returns:
            The scalar that Lightning goes backward from.
        """
        targets = batch.get("num_target_tokens", count * accumulate * processes)
        targets = torch.as_tensor(targets, device=total.device).clamp_min(1)
        self.loss += total.detach() / targets
        mask = batch.get("attention_mask")
        self.tokens += batch["input_ids"].numel() if mask is None else mask.sum()
        # The shares count / targets sum to one over the window, and so the penalty counts once.
        share = (total + penalty * count) / targets
        return share * accumulate * processes

    def close(self) -> tuple[float, float]:
        """End the window before its optimizer step, and begin the next; all processes call it.

        Returns:
            The mean loss over the targets of all processes, and their tokens per second.
        """
        both = (self.loss, self.tokens)
        device = next((v.device for v in both if isinstance(v, Tensor)), None)
        sums = torch.stack([torch.as_tensor(v, device=device).double() for v in both])
        # The one place of a training step where the host waits for the device.
        loss, tokens = distributed.total([sums])[0].tolist()
        since = self._since
        self.restart()
        return loss, tokens / max(self._since - since, 1e-9)


def stop_at_no_number(loss: float, trainer: Trainer) -> None:
    """Stop at a loss that is not a number, before it reaches the weights.

    Args:
        loss: Of the window.
        trainer: Says the step, the learning rate and the checkpoints.

    Raises:
        UserError: If the loss is infinite or NaN; names the last checkpoint before that.
    """
    if math.isfinite(loss):
        return
    rate = trainer.optimizers[0].param_groups[0]["lr"]
    raise UserError(
        f"the loss is {loss} at step {trainer.global_step} "
        f"with learning rate {rate:g}: try a lower one, more warmup_steps or "
        f"trainer.gradient_clip_val; {_last_checkpoint(trainer)}."
    )


def _last_checkpoint(trainer: Trainer) -> str:
    """Which checkpoint is from before the present step's weights."""
    callbacks = trainer.checkpoint_callbacks
    saved = [Path(path) for c in callbacks for path in getattr(c, "best_k_models", {})]
    good = [path for path in saved if 0 <= step_of(path) < trainer.global_step]
    if not good:
        return "no good checkpoint was written yet"
    return f"the last good checkpoint is {max(good, key=step_of)}"
