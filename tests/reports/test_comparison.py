"""Pictures of a comparison hold what the runs left."""

from __future__ import annotations

import numpy as np
import pytest

from lightning_peft.reports.comparison import (
    Drawn,
    draw_by_parameters,
    draw_by_seed,
    draw_curves_of,
)
from lightning_peft.reports.figures import NothingToDraw
from lightning_peft.reports.statistics import bootstrap_interval

LORA = Drawn("LoRA", {0: 0.5, 1: 0.7}, 1000, {0: [(0, 2.0), (5, 1.0)], 1: [(0, 4.0)]}, "LoRA")
PRUNED = Drawn("PrunedLoRA", {0: 0.6, 1: 0.9}, 500, {0: [(0, 3.0)]}, "LoRA")
EMPTY = Drawn("new", {})


def test_a_point_is_the_mean_score_over_parameters() -> None:
    (ax,) = draw_by_parameters([LORA, PRUNED, EMPTY], "accuracy").axes
    points = [container.lines[0].get_xydata()[0].tolist() for container in ax.containers]
    assert points == [[1000, pytest.approx(0.6)], [500, pytest.approx(0.75)]]
    low, high = bootstrap_interval([0.5, 0.7])
    bar = ax.containers[0].lines[2][0].get_segments()[0]
    assert bar[:, 1].tolist() == pytest.approx([low, high])
    assert ax.get_xscale() == "log"
    assert sorted(text.get_text() for text in ax.texts) == ["LoRA", "PrunedLoRA"]


def test_names_of_one_place_do_not_cover_each_other() -> None:
    runs = [Drawn(f"run {i}", {0: 0.5}, 1000) for i in range(4)] + [Drawn("far", {0: 0.9}, 1000)]
    (ax,) = draw_by_parameters(runs, "accuracy").axes
    low, high = ax.get_ylim()
    heights = sorted(text.xyann[1] for text in ax.texts)
    assert np.diff(heights).min() >= 0.035 * (high - low) - 1e-9


def test_a_line_has_a_point_for_each_seed_and_the_baselines_mean() -> None:
    (ax,) = draw_by_seed([LORA, PRUNED, EMPTY], "accuracy").axes
    first, second = (scatter.get_offsets()[:, 0].tolist() for scatter in ax.collections)
    assert (first, second) == ([0.5, 0.6], [0.7, 0.9])
    assert [label.get_text() for label in ax.get_yticklabels()] == ["LoRA", "PrunedLoRA"]
    marks = [line.get_xdata()[0] for line in ax.lines if len(line.get_xdata()) == 1]
    assert marks == pytest.approx([0.6, 0.75, 0.6])  # two means, and LoRA's behind PrunedLoRA


def test_a_panel_has_each_seed_the_mean_and_the_baselines() -> None:
    figure = draw_curves_of([LORA, PRUNED, EMPTY], "val_loss")
    lora, pruned = figure.axes
    assert (lora.get_title(), pruned.get_title()) == ("LoRA", "PrunedLoRA")
    assert [line.get_xydata().tolist() for line in lora.lines] == [
        [[0, 2], [5, 1]],
        [[0, 4]],
        [[0, 3], [5, 1]],
    ]
    assert [line.get_linestyle() for line in pruned.lines] == ["-", "--", "-"]
    assert pruned.lines[1].get_xydata().tolist() == [[0, 3], [5, 1]]


@pytest.mark.parametrize("draw", [draw_by_parameters, draw_by_seed, draw_curves_of])
def test_nothing_to_draw_is_said(draw) -> None:
    with pytest.raises(NothingToDraw, match="no run has .*yet"):
        draw([EMPTY], "accuracy")
