"""Metrics of predicted labels, by name: fresh torchmetrics objects, which count over processes."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection, PearsonCorrCoef, SpearmanCorrCoef
from torchmetrics.classification import (
    BinaryF1Score,
    BinaryMatthewsCorrCoef,
    MulticlassAccuracy,
)


class MatthewsCorrCoef(BinaryMatthewsCorrCoef):
    """Matthews' correlation, 0 where a class is never predicted or never there.

    So published scores have it. torchmetrics takes a limit there, by which a model that always
    predicts one class gets 0.03 on CoLA's dev set and 0.2 on five records, and an untrained one
    may become the best checkpoint.
    """

    def compute(self) -> Tensor:
        """Compute from the confusion matrix (expected, predicted)."""
        counts: Tensor = self.confmat  # type: ignore[assignment]
        if (counts.sum(0) * counts.sum(1) == 0).any():
            return torch.zeros((), device=counts.device)
        return super().compute()


def make_metrics(names: Sequence[str], classes: int) -> MetricCollection:
    """Make metrics.

    Args:
        names: Of ``accuracy``, ``f1`` (of class 1), ``matthews``, ``spearman``, ``pearson``.
        classes: How many there are.

    Returns:
        Metrics by name; they take predictions and labels, (n,) each.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*will save all targets")
        made: dict[str, Metric | MetricCollection] = {n: _make(n, classes) for n in names}
    return MetricCollection(made)


def _make(name: str, classes: int) -> Metric:
    if name == "accuracy":
        return MulticlassAccuracy(classes, average="micro")
    return {
        "f1": BinaryF1Score,
        "matthews": MatthewsCorrCoef,
        "spearman": SpearmanCorrCoef,
        "pearson": PearsonCorrCoef,
    }[name]()
