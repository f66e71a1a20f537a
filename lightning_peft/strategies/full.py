"""Full fine-tuning: everything trains. The row that adapters are measured against."""

from __future__ import annotations

from torch import nn

from lightning_peft.adapters.attach import AttachReport, make_report
from lightning_peft.strategies.trained_weights import TrainedWeights


class FullFineTuning(TrainedWeights):
    """All parameters of the model train, embeddings, norms and heads too."""

    def __init__(self, modules_to_save: list[str] | None = None) -> None:
        super().__init__(modules_to_save=modules_to_save)

    def attach(self, model: nn.Module, initialize: bool = True) -> AttachReport:
        """Set all parameters free."""
        report = super().attach(model, initialize)
        model.requires_grad_(True)
        return make_report(model, report.strategy, report.matched)
