from __future__ import annotations

import pytest
import scipy.stats
import torch

from lightning_peft.datamodules.metrics.labels import make_metrics


def test_metrics_are_those_of_an_independent_computation() -> None:
    generator = torch.Generator().manual_seed(0)
    predicted = torch.randint(2, (200,), generator=generator)
    labels = torch.where(torch.rand(200, generator=generator) < 0.7, predicted, 1 - predicted)
    tp, tn = ((predicted == labels) & (labels == c) for c in (1, 0))
    tp, tn = int(tp.sum()), int(tn.sum())
    fp, fn = int((predicted > labels).sum()), int((predicted < labels).sum())
    metrics = make_metrics(("accuracy", "f1", "matthews"), 2)
    metrics.update(predicted, labels)
    found = metrics.compute()
    assert found["accuracy"] == pytest.approx((tp + tn) / 200)
    assert found["f1"] == pytest.approx(2 * tp / (2 * tp + fp + fn))
    # Matthews' coefficient is Pearson's of the two columns of zeros and ones.
    pearson = scipy.stats.pearsonr(predicted.numpy(), labels.numpy()).statistic
    assert found["matthews"] == pytest.approx(pearson, abs=1e-6)
    scores = torch.rand(50, generator=generator).mul(8).round() / 2  # with ties
    outputs = scores + torch.randn(50, generator=generator)
    metrics = make_metrics(("spearman", "pearson"), 0)
    metrics.update(outputs, scores)
    found = metrics.compute()
    a, b = outputs.numpy(), scores.numpy()
    assert found["spearman"] == pytest.approx(scipy.stats.spearmanr(a, b).statistic, abs=1e-5)
    assert found["pearson"] == pytest.approx(scipy.stats.pearsonr(a, b).statistic, abs=1e-5)


@pytest.mark.parametrize("constant", [0, 1])
def test_matthews_of_one_class_is_zero(constant: int) -> None:
    metrics = make_metrics(("matthews",), 2)
    metrics.update(torch.full((5,), constant), torch.tensor([0, 1, 1, 0, 0]))
    assert metrics.compute()["matthews"] == 0
