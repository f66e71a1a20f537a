"""How the loss stands noise on the weights: a measure of robustness at the end of training.

PrunedLoRA's abstract (https://arxiv.org/abs/2510.00192) says that under weight perturbation
pruning by gradients is more robust than by activations, with respect to the overall loss. It does
not say which perturbation; here it is Gaussian noise on the base weights of the adapted linears,
relative to each one's root mean square, after training.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from lightning_peft.adapters import adapter_layers
from lightning_peft.adapters.dense import is_quantized
from lightning_peft.errors import UserError


class WeightPerturbation(Callback):
    """Measure the validation loss under noise, and how much it rises above that without.

    Into ``run.json`` go, for each scale, ``perturbed_loss/0.1`` and ``loss_rise/0.1``.

    Args:
        scales: Standard deviations of the noise, as shares of a weight's root mean square.
        draws: Noises over which is averaged.
        max_batches: Validation batches; all when None.
        seed: Of the noises, the same for every run.

    Raises:
        UserError: If ``scales`` is empty, or a number lies outside its range.
    """

    def __init__(
        self,
        scales: Sequence[float] = (0.05, 0.1, 0.2),
        draws: int = 3,
        max_batches: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not scales or min(scales) <= 0:
            raise UserError(f"scales must be numbers above zero, at least one, got {scales}.")
        for key, count in (("draws", draws), ("max_batches", max_batches)):
            if count is not None and count < 1:
                raise UserError(f"{key} must be at least 1, got {count}.")
        self.scales, self.draws, self.max_batches, self.seed = scales, draws, max_batches, seed

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure, on every process its own validation batches."""
        weights = [layer.base.weight for layer in adapter_layers(pl_module).values()]
        if any(is_quantized(layer.base) for layer in adapter_layers(pl_module).values()):
            raise UserError("WeightPerturbation needs a base without quantization.")
        batches = trainer.val_dataloaders
        if not weights or batches is None:
            return
        clean = self._loss(pl_module, batches)
        found: dict[str, float] = {}
        for scale in self.scales:
            losses = []
            for draw in range(self.draws):
                with noise_on(weights, scale, self.seed + draw):  # type: ignore[arg-type]
                    losses.append(self._loss(pl_module, batches))
            mean = sum(losses) / len(losses)
            found |= {f"perturbed_loss/{scale:g}": mean, f"loss_rise/{scale:g}": mean - clean}
        trainer.callback_metrics.update({key: torch.tensor(v) for key, v in found.items()})

    @torch.no_grad()
    def _loss(self, pl_module: Any, batches: Any) -> float:
        was_training = pl_module.training
        pl_module.eval()
        total, count = 0.0, 0
        for i, batch in enumerate(batches):
            if i == self.max_batches:
                break
            batch = pl_module.transfer_batch_to_device(batch, pl_module.device, 0)
            loss, targets = pl_module.target_loss(batch)
            total, count = total + float(loss), count + int(targets)
        pl_module.train(was_training)
        return total / max(count, 1)


@contextmanager
@torch.no_grad()
def noise_on(weights: Sequence[nn.Parameter], scale: float, seed: int) -> Iterator[None]:
    """Add Gaussian noise to weights, and take it away again to the bit.

    Args:
        weights: Of any shape.
        scale: Standard deviation, as a share of each weight's root mean square.
        seed: Of the noise.
    """
    generator = torch.Generator().manual_seed(seed)
    before = [weight.detach().to("cpu", copy=True) for weight in weights]
    try:
        for weight in weights:
            noise = torch.randn(weight.shape, generator=generator).to(weight)
            size: Tensor = weight.float().norm() / math.sqrt(weight.numel())
            weight.add_(noise * (scale * size).to(weight.dtype))
        yield
    finally:
        for weight, value in zip(weights, before, strict=True):
            weight.copy_(value)
