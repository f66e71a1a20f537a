"""What a strategy that looks at data before training is given: a sample, and its loss."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_peft import distributed
from lightning_peft.adapters import trainable_parameters
from lightning_peft.adapters.attach import make_report
from lightning_peft.errors import UserError
from lightning_peft.models.sharded_loading import stored_parameters
from lightning_peft.modules.window import Batch


class Shares:
    """This process' share of a loader's batches, again and again; None where none is left for it.

    Args:
        loader: Gives all batches.
    """

    def __init__(self, loader: Iterable[Batch]) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[Batch | None]:
        return iter(distributed.shared_out(self.loader))


class Probe:
    """What :meth:`AdapterStrategy.prepare` is given.

    Args:
        module: The :class:`AdaptedModule`, whose trainer's data module has
            ``probe_dataloader(ratio)``.
    """

    def __init__(self, module: Any) -> None:
        self.module = module

    def sample(self, ratio: float) -> Iterable[Any]:
        """This process' batches of a share (0 to 1) of the training data.

        Raises:
            UserError: If the data module gives none.
        """
        data = getattr(self.module.trainer, "datamodule", None)
        if data is None or not hasattr(data, "probe_dataloader"):
            raise UserError(
                f"{type(self.module.adapter).__name__} looks at a sample of the training data, for "
                "which the data module needs probe_dataloader(ratio)."
            )
        return Shares(data.probe_dataloader(ratio))

    def loss(self, batch: Batch | None) -> Tensor:
        """Mean loss over a batch's targets, a scalar; zero where no batch is left.

        Its gradients, averaged over processes, are those of the mean over the targets of all.
        """
        module = self.module
        if batch is None:  # this process only takes part
            trained = [p for p in module.model.parameters() if p.requires_grad]
            total, count = sum(p.sum() * 0.0 for p in trained), torch.zeros(())
        else:
            batch = module.transfer_batch_to_device(batch, module.device, 0)
            total, count = module.target_loss(batch)
        if torch.is_grad_enabled():
            count = distributed.mean(count.double()).to(module.device)
        return total / count.clamp_min(1e-6)  # type: ignore[operator]


def prepare_strategy(module: Any) -> None:
    """Let a module's strategy look at data, on the device where the run will be.

    Args:
        module: The :class:`AdaptedModule`, under a trainer, its model built.
    """
    model, adapter, trainer = module.model, module.adapter, module.trainer
    if not stored_parameters(model):
        module.to(trainer.strategy.root_device)
    before = trainable_parameters(model, include_saved=True)
    probe, accumulate = Probe(module), trainer.accumulate_grad_batches
    adapter.prepare(model, probe.sample, probe.loss, module.make_optimizer, accumulate)
    if trainable_parameters(model, include_saved=True) != before:
        rank_zero_info(str(make_report(model, type(adapter).__name__, {})))
