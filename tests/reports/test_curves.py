"""The picture of a run's metrics."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_peft.reports import draw_curves, save_curves


def test_curves_hold_the_metrics() -> None:
    rows = [
        {"step": 0.0, "train_loss": 2.0, "rank": 8.0},
        {"step": 9.0, "val_loss": 1.5},
        {"step": 10.0, "train_loss": 1.0, "rank": 4.0},
    ]
    figure = draw_curves(rows, "PrunedLoRA")
    lines = {
        line.get_label(): line.get_xydata().tolist() for ax in figure.axes for line in ax.lines
    }
    assert lines["train_loss"] == [[0, 2], [10, 1]]
    assert lines["val_loss"] == [[9, 1.5]]
    assert lines["rank"] == [[0, 8], [10, 4]]
    assert [ax.get_title() for ax in figure.axes] == ["loss", "mean rank"]


def test_nothing_to_draw_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="none of the metrics"):
        draw_curves([{"step": 0, "lr": 0.1}])
    with pytest.raises(
        FileNotFoundError, match=r"metrics\.csv does not exist; a fit with a CSVLog"
    ):
        save_curves(tmp_path)


def test_many_training_losses_stay_behind_the_few_of_validation() -> None:
    rows = [{"step": float(i), "train_loss": 1.0} for i in range(30)]
    rows += [{"step": 10.0, "val_loss": 1.0}, {"step": 20.0, "val_accuracy": 0.5}]
    loss, accuracy = draw_curves(rows).axes
    many, few = loss.lines
    assert (many.get_alpha(), many.get_linewidth(), many.get_marker()) == (0.7, 0.8, "None")
    assert (few.get_alpha(), few.get_linewidth(), few.get_marker()) == (1, 1.5, "o")
    assert accuracy.get_ylim() == (-0.02, 1.02)


def test_the_picture_lies_beside_its_table(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("step,train_loss\n0,2.0\n9,1.0\n")
    assert save_curves(tmp_path, "LoRA") == tmp_path / "curves.png"
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
