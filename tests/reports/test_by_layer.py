"""Layers by kinds for each run of a comparison."""

from __future__ import annotations

import pytest

from lightning_peft.reports.by_layer import draw_by_layer
from lightning_peft.reports.figures import NothingToDraw


def test_a_run_is_a_panel_in_one_scale_of_colours() -> None:
    runs = {
        "LoRA": {("q_proj", "0"): 1.0, ("q_proj", "10"): 2.0, ("v_proj", "2"): 3.0},
        "none": {},
        "DropLoRA": {("q_proj", "0"): 4.0},
    }
    figure = draw_by_layer(runs, "share")
    first, second, bar = figure.axes
    assert (first.get_title(), second.get_title()) == ("LoRA", "DropLoRA")
    grid = first.images[0].get_array()
    assert grid.shape == (3, 2)
    assert (grid[0, 0], grid[2, 0], grid[1, 1]) == (1.0, 2.0, 3.0)
    assert grid.mask.sum() == 3
    assert [label.get_text() for label in first.get_yticklabels()] == ["0", "2", "10"]
    assert [label.get_text() for label in first.get_xticklabels()] == ["q", "v"]
    assert first.images[0].norm.vmax == second.images[0].norm.vmax == 4.0
    assert bar.get_xlabel() == "share"


def test_cells_bear_their_values_up_to_thirty_two_layers() -> None:
    few = draw_by_layer({"a": {("q", "0"): 0.12345}}, "", digits=3).axes[0]
    assert [text.get_text() for text in few.texts] == ["0.123"]
    many = draw_by_layer({"a": {("q", str(i)): 1.0 for i in range(33)}}, "").axes[0]
    assert not many.texts


def test_nothing_to_draw_is_said() -> None:
    with pytest.raises(NothingToDraw, match="no run has values by layer yet"):
        draw_by_layer({"a": {}}, "")
